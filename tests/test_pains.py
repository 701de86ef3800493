"""What users of explanation tools suffer, and the tests that keep it from happening here.

The pains are from the issue trackers of captum, pytorch-grad-cam, Quantus, inseq, TorchRay, MONAI and torch-cam, and
from running their releases. Most have their tests where the code's other tests are, and are listed; the rest are here.
"""

from __future__ import annotations

import ast
import gc
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, drawn
from torch import Tensor, nn

from moreau_ext import METHODS, MoreauGrad, ProximalGradient, SmoothGrad
from moreau_ext.model.bind import bind_score

EXPLAINERS, SCORES, RUNNER = "explainers/test_explainers.py", "model/test_scores.py", "batch/test_batch_runner.py"
CAPTUM, QUANTUS = "integrations/test_captum.py", "integrations/test_quantus.py"

# By pain, the rule and its tests: a file and the names in it.
ELSEWHERE: dict[str, dict[str, list[str]]] = {
    "01 out of memory: passes are cut below an input's samples, and the maps stay the same": {
        "model/test_memory.py": ["test_a_pass_that_does_not_fit_is_split", "test_a_call_takes_what_is_predicted"],
        EXPLAINERS: ["test_max_batch_caps_the_passes_and_nothing_else"],
        "ops/test_ops.py": ["test_accumulate_does_not_depend_on_the_chunks"],
    },
    "02 slow: a step waits for no value of the device": {
        "capture/test_graphs.py": ["test_replays_give_the_bits_of_steps_one_by_one"],
        "capture/test_cuda_graphs.py": ["test_no_step_waits_for_the_device"],
    },
    "03 data sets: loaders and streams are read, and jobs go on where they stopped": {
        "batch/test_batch_inputs.py": ["test_loaders_in_order"],
        RUNNER: ["test_streams", "test_only_what_is_missing_is_done_again", "test_kill_9_again_and_again"],
    },
    "04 memory that grows: no graph, input or hook is kept": {
        EXPLAINERS: ["test_passes_leave_nothing_behind", "test_many_steps_hold_no_more_memory_than_few"],
    },
    "05 several devices: one process each over ids of its own, with the same maps": {
        EXPLAINERS: ["test_a_model_elsewhere"],
        RUNNER: ["test_noise_is_keyed_by_the_id_alone", "test_workers_change_nothing"],
        "batch/test_batch_ray.py": ["test_two_workers_give_the_same_rows"],
        "capture/test_cuda_graphs.py": ["test_maps_are_those_of_the_cpu_to_rounding"],
        "model/test_parallel.py": ["test_data_parallel", "test_distributed_data_parallel", "test_offloaded_weights"],
    },
    "06 a different map each run: noise by seed and id; global generators stay": {
        EXPLAINERS: [
            "test_the_same_bits_each_run", "test_ids_name_the_noise", "test_everything_is_left_as_it_was_found",
        ],
        "model/test_memory.py": ["test_measuring_neither_reads_nor_moves_random_numbers"],
    },
    "07 a map does not depend on its batch": {
        EXPLAINERS: ["test_a_map_is_its_inputs_own", "test_a_split_batch_gives_the_same_maps"],
        "solvers/test_adaptive.py": ["test_inputs_do_not_depend_on_each_other"],
        "solvers/test_tuning.py": ["test_found_settings_do_not_depend_on_the_batch"],
        "integrations/test_text.py": ["test_scores_depend_neither_on_padding_nor_on_the_batch"],
    },
    "08 train mode: eval inside, every flag and buffer as before, after exceptions too": {
        EXPLAINERS: [
            "test_train_mode_is_said_once_and_explained_in_eval_mode", "test_everything_is_left_as_it_was_found",
        ],
        SCORES: ["test_evaluating_switches_and_restores_every_module", "test_evaluating_restores_after"],
        "model/test_state.py": ["test_buffers_come_back", "test_an_interrupt_at_any_moment"],
    },
    "10 operations in place": {
        EXPLAINERS: ["test_in_place_operations"],
        "model/test_one_path.py": ["test_models_that_change_their_input"],
    },
    "11 token ids: the error names embeddings; layers and text explain such models": {
        EXPLAINERS: ["test_bad_inputs", "test_a_score_that_ignores_its_input", "test_one_ignored_tensor_of_a_tuple"],
        "model/test_calling.py": ["test_layers_of_models_whose_inputs_are_integers"],
        "integrations/test_text.py": ["test_the_deciding_word_alone"],
    },
    "12 inputs, arguments and outputs by name": {
        SCORES: ["test_logits_are_found"],
        "model/test_calling.py": [
            "test_inputs_and_arguments_by_name_equal_those_by_position", "test_outputs_of_any_kind_are_read",
        ],
        "explainers/test_input_forms.py": ["test_a_callable_target_reads_any_output"],
    },
    "13 targets of every form, with shapes in the messages": {
        SCORES: [
            "test_every_form_of_a_target", "test_one_target_for_all", "test_none_is_the_predicted_class",
            "test_a_model_with_one_output", "test_bad_targets",
        ],
        EXPLAINERS: ["test_a_segmentation_output"],
        "model/test_batches.py": [
            "test_a_callable_with_something_for_each_input", "test_a_list_of_callables_sees_rows_alone",
        ],
    },
    "14 no_grad, inference_mode, frozen parameters": {EXPLAINERS: ["test_gradient_modes"]},
    "15 the caller's tensors are not touched, after exceptions too": {
        EXPLAINERS: ["test_inputs_that_require_grad", "test_everything_is_left_as_it_was_found"],
        SCORES: ["test_only_input_gradients_are_computed"],
    },
    "16 half precision: passes in the asked dtype, states in float32": {
        EXPLAINERS: ["test_half_precision", "test_autocast", "test_overflow_in_half_precision_is_named"],
        "model/test_precision.py": ["test_bfloat16_runs_the_model_and_keeps_the_rest_in_float32"],
    },
    "17 empty maps: counted, warned of once, defined in metrics, drawn blank": {
        EXPLAINERS: ["test_a_ratio_of_one_is_zero_and_says_so_once", "test_a_flat_score_is_solved_and_empty"],
        "evaluation/test_evaluation.py": ["test_gini_of_nothing"],
        "evaluation/test_metrics.py": ["test_empty_maps_have_no_direction", "test_topk_of_zeros_and_ties"],
        "test_plots.py": ["test_a_map_of_zeros_is_blank_and_says_so", "test_blank_maps_are_drawn_blank"],
        QUANTUS: ["test_empty_maps_do_not_reach_quantus"],
    },
    "18 units: settings are absolute or relative by name, maps are signed and not normalised": {
        "test_facts.py": ["test_scaling", "test_linear", "test_eta_max"],
        EXPLAINERS: ["test_one_number_per_input_with_absolute_noise", "test_bad_settings"],
    },
    "19 the map's derivative is the implicit one": {
        "analysis/test_implicit.py": ["test_differences_of_the_solve", "test_what_cannot_be_measured_is_said"],
        EXPLAINERS: ["test_inputs_that_require_grad"],
    },
    "20 installing: torch and numpy alone": {
        "test_package.py": ["test_the_build_asks_for_no_torch"],
        "test_layering.py": ["test_importing_costs_torch_and_numpy_alone"],
    },
    "trap: NoiseTunnel calls attribute.__wrapped__": {CAPTUM: ["test_noise_tunnel"]},
    "trap: metrics repeat inputs under no_grad": {CAPTUM: ["test_sensitivity_without_a_nudge_is_zero"]},
    "trap: Quantus hands over float64 arrays, device and method": {
        QUANTUS: ["test_every_method_by_quantus_call", "test_other_dtypes"],
    },
    "trap: captum.testing's nets with known gradients": {CAPTUM: ["test_gradients_of_captums_own_models"]},
}  # fmt: skip


@pytest.mark.parametrize("pain", ELSEWHERE)
def test_a_pain_has_the_tests_that_are_listed(pain: str) -> None:
    for file, names in ELSEWHERE[pain].items():
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert names
        assert {*names} <= tests, file


def test_every_pain_is_kept_from_happening() -> None:
    here = {int(found[1]) for name in globals() if (found := re.match(r"test_pain_(\d\d)_", name))}
    elsewhere = {int(pain[:2]) for pain in ELSEWHERE if pain[0].isdigit()}
    assert here | elsewhere == {*range(1, 21)}
    assert sum(pain.startswith("trap") for pain in ELSEWHERE) == 4


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3)).eval()


def test_pain_02_one_backward_pass_serves_all_inputs_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a summed score; one gradient for each row would take 32."""
    explainer, grad, calls = SmoothGrad(net(), num_samples=8, max_batch=None), torch.autograd.grad, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return grad(*args, **kwargs)

    explainer.attribute(drawn(4, 5), 1)  # the first call looks whether rows mix
    monkeypatch.setattr(torch.autograd, "grad", counted)
    explainer.attribute(drawn(4, 5), 1)
    assert len(calls) == 1


def test_pain_04_two_hundred_calls_hold_what_twenty_hold() -> None:
    explainer = MoreauGrad(net(), rho=0.1, solver=ProximalGradient(2, 3, 0.1, average_last=2, tol=0.0))
    held = []
    for calls in (20, 200):
        for _ in range(calls):
            explainer.attribute(drawn(2, 5), 1)
        gc.collect()
        objects = gc.get_objects()
        held.append((sum(issubclass(type(o), Tensor) for o in objects), len(objects)))
        del objects
    assert held[1][0] == held[0][0]
    assert held[1][1] - held[0][1] < 50


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN, None], ids=str)
def test_pain_09_recurrent_layers_are_differentiated_in_eval_mode(recurrent: Any) -> None:
    """cuDNN refuses to; it is off for passes on a GPU with such a layer, and for no others."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3) if recurrent is None else recurrent(5, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found = self.layer(x)
            output: Tensor = (found if recurrent is None else found[0])[:, -1]
            return output

    x, model = drawn(2, 4, 5), Model().eval()
    score, _ = bind_score(model, (x,), 1)
    with score.passing(torch.device("cuda", 0)):
        assert torch.backends.cudnn.enabled == (recurrent is None)
    assert torch.backends.cudnn.enabled
    assert MoreauGrad(model, rho=0.1).attribute(x, 1).abs().sum() > 0
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_pain_13_a_wrong_target_costs_no_pass(method: str) -> None:
    seen: list[int] = []

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    for wrong in ([0], [0, 1, 2], torch.zeros(2), "cat", [lambda row: row[0]]):
        with pytest.raises((ValueError, TypeError), match=r"target: expected"):
            METHODS[method](model).attribute(drawn(2, 5), wrong)
    assert seen == []


def test_pain_13_the_similarity_of_embeddings_is_a_callable() -> None:
    """To one anchor for all inputs, and to a partner of each."""
    model, x, anchors = net(), drawn(2, 5), drawn(2, 3, seed=1)
    explainer = SmoothGrad(model, num_samples=1, sigma=0.0)
    leaf = x.clone().requires_grad_()
    cosine = nn.functional.cosine_similarity
    for anchor in (anchors[0], anchors):
        (expected,) = torch.autograd.grad(cosine(model(leaf), anchor.expand(2, 3)).sum(), leaf)
        found = explainer.attribute(x, lambda rows, a=anchor: cosine(rows, a.expand(len(rows), 3)))
        torch.testing.assert_close(found, expected)
    (expected,) = torch.autograd.grad(cosine(model(leaf), anchors).sum(), leaf)
    one_each = [lambda row, a=a: cosine(row, a, dim=0) for a in anchors]
    torch.testing.assert_close(explainer.attribute(x, one_each), expected)


def test_pain_20_importing_loads_no_toolbox_and_nothing_is_pinned(tmp_path: Path) -> None:
    code = """
import sys, moreau_ext
for name in moreau_ext.__all__:
    getattr(moreau_ext, name)
print(*sorted({m.split(".")[0] for m in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    toolboxes = {
        "torchvision",
        "matplotlib",
        "captum",
        "quantus",
        "zennit",
        "pytorch_grad_cam",
        "inseq",
        "transformers",
    }
    assert not toolboxes & {*done.stdout.split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [
        r for name, group in extras.items() if name not in ("test", "dev") for r in group
    ]
    assert not [r for r in asked if re.search(r"[<~]|==", r)]
    names = {re.split(r"[><=\[]", r)[0] for r in asked}
    assert not names & {"torchvision", "opencv-python", "opencv-python-headless"}
