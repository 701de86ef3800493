"""How much of this package one explanation passes through: functions, files, depth, Solutions built.

    python tools/trace_attribute.py

Traces the second call of ``SparseMoreauGrad(model).attribute(x)`` on four 8x8 inputs, on the CPU. A function is a
distinct piece of code of this package that is entered; comprehensions and generator expressions count with the function
they stand in, and how many have a frame of their own is printed beside it.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import moreau_ext
from moreau_ext import Solution, SparseMoreauGrad

ROOT = Path(moreau_ext.__file__).parent


class Trace:
    """Collects what is entered below :data:`ROOT`; use as a context manager."""

    def __init__(self) -> None:
        self.functions: Counter[CodeType] = Counter()
        self.depth = 0
        self.deepest: list[str] = []
        self.calls: set[tuple[str, str]] = set()
        self._stack: list[CodeType] = []

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(str(ROOT)):
            return
        if event == "call":
            if self._stack and self._stack[-1].co_filename != code.co_filename:
                self.calls.add((_short(self._stack[-1]), _short(code)))
            self._stack.append(code)
            self.functions[code] += 1
            if len(self._stack) > self.depth:
                self.depth = len(self._stack)
                self.deepest = [f"{_short(c)}:{c.co_qualname}" for c in self._stack]
        elif event == "return" and self._stack:
            self._stack.pop()

    def __enter__(self) -> Trace:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def _short(code: CodeType) -> str:
    return str(Path(code.co_filename).relative_to(ROOT))


def trace() -> tuple[Trace, int]:
    """The trace of the second call, and how many Solutions it built."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Softplus(), torch.nn.Linear(32, 10)
    ).eval()
    x = torch.rand(4, 1, 8, 8)
    explainer = SparseMoreauGrad(model)
    explainer.attribute(x)
    built = 0
    original = Solution.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal built
        built += 1
        original(self, *args, **kwargs)

    Solution.__init__ = counted  # type: ignore[method-assign]  # counted
    try:
        with Trace() as found:
            explainer.attribute(x)
    finally:
        Solution.__init__ = original  # type: ignore[method-assign]  # counted
    return found, built


def main() -> None:
    found, solutions = trace()
    files = Counter(_short(code) for code in found.functions)
    both_ways = sorted({tuple(sorted(pair)) for pair in found.calls if pair[::-1] in found.calls})
    inner = [code for code in found.functions if code.co_name in ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>")]
    print(f"functions  {len(found.functions) - len(inner)}, and {len(inner)} comprehensions")
    print(f"files      {len(files)}")
    print(f"depth      {found.depth}")
    print(f"calls      {sum(found.functions.values())}")
    print(f"Solutions  {solutions}")
    print("files that call each other:", *(f"{a} <-> {b}" for a, b in both_ways) if both_ways else ["none"])
    if "--all" in sys.argv:
        for name, count in sorted(files.items()):
            print(f"\n{name}: {count}")
            for code in found.functions:
                if _short(code) == name:
                    print(f"  {found.functions[code]:5d} {code.co_qualname}")
        print("\ndeepest:", *found.deepest, sep="\n  ")


if __name__ == "__main__":
    main()
