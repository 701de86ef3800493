"""Tables behind a fitted pipeline of scikit-learn, on models whose answers are known."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import nn

from moreau_ext import ProximalGradient, TabularExplainer, zoo
from moreau_ext._errors import EmptyMapWarning

RAW = load_breast_cancer(as_frame=True).data
ROWS = RAW.iloc[[3, 100, 400]]


def linear(features: int = 30) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(features, 1).double().eval()


def pipeline() -> Pipeline:
    return make_pipeline(MinMaxScaler((-1, 3)), StandardScaler()).fit(RAW)


@pytest.mark.parametrize("method", ["gradient", "moreau"])
def test_slopes_of_a_linear_model_are_its_coefficients_over_the_scale(method: str) -> None:
    net = linear()
    found = TabularExplainer(net, pipeline(), method=method).attribute(ROWS)
    spread, means = torch.tensor(RAW.std(ddof=0).to_numpy()), torch.tensor(RAW.mean().to_numpy())
    expected = (net.weight.detach() / spread).expand(3, -1)
    torch.testing.assert_close(found.slopes, expected, rtol=1e-6, atol=0)
    # The scores add up to the difference of the output from that at the means.
    torch.testing.assert_close(found.scores, expected * (torch.tensor(ROWS.to_numpy()) - means), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.scores.sum(1), net(torch.tensor(pipeline().transform(ROWS)))[:, 0] - net.bias)
    assert found.names == tuple(RAW.columns)


def test_a_sparse_map_is_of_the_scaled_features() -> None:
    """Soft thresholding of the coefficients, whatever the units; other units of a column change nothing else."""
    net, ratio = linear(), 0.4
    w = net.weight.detach()[0]
    kept = w.sign() * (w.abs() - ratio * w.abs().max()).relu()
    in_mm = RAW.assign(**{"mean radius": RAW["mean radius"] * 1000})
    scores = []
    for table in (RAW, in_mm):
        scaler = StandardScaler().fit(table)
        found = TabularExplainer(net, scaler, eta_ratio=ratio).attribute(table.iloc[:2])
        torch.testing.assert_close(found.slopes[0] * torch.tensor(scaler.scale_), kept, rtol=1e-6, atol=1e-9)
        scores.append(found.scores)
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-9)


def test_a_table_of_numbers_and_a_background() -> None:
    net = linear(4)
    x = torch.rand(3, 4, dtype=torch.float64)
    found = TabularExplainer(net, feature_names="abcd", background=[[1.0, 0, 0, 0], [3.0, 0, 0, 0]]).attribute(
        x.numpy()
    )
    torch.testing.assert_close(found.scores, found.slopes * (x - torch.tensor([2.0, 0, 0, 0])))
    torch.testing.assert_close(TabularExplainer(net).attribute(x).scores, found.slopes * x)
    assert TabularExplainer(net).attribute(x).names == ("0", "1", "2", "3")


def test_tables_and_figures_of_a_trained_net() -> None:
    """The zoo's net takes columns that were standardised by the train rows."""
    train = torch.randperm(569, generator=torch.Generator().manual_seed(0))[:455]
    scaler = StandardScaler().fit(RAW.iloc[train.tolist()])
    solver = ProximalGradient(num_samples=16, max_steps=20, tol=0.0)
    found = TabularExplainer(zoo.trained("tabular_mlp"), scaler, support=5, solver=solver).attribute(RAW.iloc[:8], 0)
    frame = pd.DataFrame(found.columns(2))
    assert frame.columns.tolist() == ["feature", "value", "slope", "score", "error"]
    assert (frame["score"] != 0).sum() == 5
    assert frame["score"].abs().is_monotonic_decreasing
    radius = frame[frame["feature"] == "mean radius"]
    assert radius["value"].item() == RAW["mean radius"][2]
    whole = pd.DataFrame(found.columns()).set_index("feature")
    expected = found.scores.abs()
    assert whole["mean |score|"].sum() == pytest.approx(expected.mean(0).sum().item())
    assert whole["error"]["mean radius"] == pytest.approx(expected[:, 0].std().item() / 8**0.5)
    assert whole["share"].sum() == pytest.approx(5)
    lines = repr(found).splitlines()
    assert len(lines) == 31
    assert lines[1].startswith(whole.index[0])
    of_row = [label.get_text() for label in found.plot(2, limit=6).axes[0].get_yticklabels()]
    assert of_row == frame["feature"][:6].tolist()
    of_all = [label.get_text() for label in found.plot(limit=7).axes[0].get_yticklabels()]
    assert of_all == whole.index[:7].tolist()


def test_a_warning_names_the_callers_line() -> None:
    explainer = TabularExplainer(linear(), eta=1e9)
    with pytest.warns(EmptyMapWarning, match="3 of 3 maps are zero") as said:
        found = explainer.attribute(ROWS)
    assert [w.filename for w in said] == [__file__]
    assert not found.scores.any()


def test_errors_name_the_cure() -> None:
    with pytest.raises(TypeError, match=r"transformer: .* give pipeline\[:-1\]"):
        TabularExplainer(linear(), object())  # type: ignore[arg-type]  # the error is the test
    with pytest.raises(ValueError, match="transformer: PCA does not scale and shift each feature by itself"):
        TabularExplainer(linear(), PCA().fit(RAW)).attribute(ROWS)
    with pytest.raises(ValueError, match="feature_names: expected one per column, 30, got 2"):
        TabularExplainer(linear(), feature_names=["a", "b"]).attribute(ROWS)
    with pytest.raises(ValueError, match=r"table: expected \[rows, features\], got shape \(30,\)"):
        TabularExplainer(linear()).attribute(RAW.iloc[0])
    with pytest.raises(TypeError, match=r"table: expected numbers \[rows, features\], got DataFrame"):
        TabularExplainer(linear()).attribute(pd.DataFrame({"a": ["x"]}))
    with pytest.raises(ValueError, match="background: expected 30 columns, as in the table, got 2"):
        TabularExplainer(linear(), background=[[1, 2]]).attribute(ROWS)
