"""A hook of mkdocs.yml: pages of the repository's root and notebooks become pages of the site; links fit both places.

README.md, CHANGELOG.md and others stay where GitHub looks for them. Their links (docs/guide.md) and those to them
(../SECURITY.md) are rewritten for the site. A link to a file that is no page of the site becomes its path.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Page of the site: file of the repository.
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarking.md": "benchmarks/README.md",
    "security.md": "SECURITY.md",
}
NOTEBOOKS = {f"example-{path.stem}.md": f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.ipynb"))}
_LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]+)?\)"
)
_IMAGE = re.compile(r'(?<=<img src=")(?!https?:)[^"]+')
_CODE = re.compile(r"`[^`\n]+`")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page, source in NOTEBOOKS.items():
        text, pictures = _notebook(ROOT / source, page.removesuffix(".md"))
        files.append(File.generated(config, page, content=text))
        for name, png in pictures.items():
            files.append(File.generated(config, name, content=png))
    return files


def on_post_build(config: Any, **_: Any) -> None:
    # It is for a server: its links start at the server's root, where files have no site.
    Path(config.site_dir, "404.html").unlink()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = (PAGES | NOTEBOOKS).get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _rewritten(part, source) for part in parts)


def _notebook(path: Path, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their file's name."""
    parts: list[str] = []
    pictures = {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode(data["image/png"])
                parts.append(f'<img src="../docs/{file}" alt="The picture that the code above draws">')
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    # Below the title.
    parts.insert(1, f"This page is the notebook `{path.relative_to(ROOT)}` with its outputs.")
    return "\n\n".join(parts), pictures


def _rewritten(text: str, source: str) -> str:
    def target(path: str) -> str | None:
        """Its page or file of the site, None where there is none."""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        named = {file: page for page, file in (PAGES | NOTEBOOKS).items()}
        if path in named:
            return named[path]
        return path.removeprefix("docs/") if path.startswith("docs/") else None

    def link(match: re.Match[str]) -> str:
        path = target(match["path"])
        if path is None:
            return f"{match['text']} (`{match['path']}`)" if match["text"] != match["path"] else f"`{match['path']}`"
        return f"{match['image']}[{match['text']}]({path}{match['anchor'] or ''})"

    # In a table's code GitHub wants \| where Python-Markdown shows the backslash.
    text = _CODE.sub(lambda match: match[0].replace(r"\|", "|"), text)
    text = _LINK.sub(link, text)
    return _IMAGE.sub(lambda match: target(match[0]) or match[0], text)
