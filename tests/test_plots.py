"""The figures are drawn, and show what they promise: every arm and cell, the choice, the base model, error bars."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ember.data.arms import Arm
from ember.methods import METHODS
from ember.reporting import feature_plots, plots

SCORES = tuple(plots.SCORE_STYLES)
ARMS = [("ember", False), ("snmf", False), ("snmf", True), ("rmu", False), ("rmu", True)]
CELLS = ("layer=7 lr=0.001", "layer=7 lr=0.1", "layer=3 lr=0.001", "layer=3 lr=0.1")


@pytest.fixture(autouse=True)
def drawn():
    """Every figure of a test can be drawn."""
    with plt.rc_context():
        plots.use_theme()
        yield
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
    plt.close("all")


def scored(**keys) -> list[dict]:
    """The four scores with an interval, and a further one that no figure shows."""
    values = {metric: 0.2 + 0.15 * k for k, metric in enumerate((*SCORES, "harmonic"))}
    return [{**keys, "metric": m, "value": v, "ci_low": v - 0.05, "ci_high": v + 0.1} for m, v in values.items()]


def apart(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows).assign(value=lambda f: f.value + 0.01 * np.arange(len(f)))


def grid_frame(cells=CELLS, **keys) -> pd.DataFrame:
    return apart([row for cell in cells for row in scored(cell=cell, **keys)])


def arm_frame(arms=ARMS) -> pd.DataFrame:
    return pd.DataFrame([row for method, ember in arms for row in scored(method=method, ember=ember)])


def labels_of(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def legend_of(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def bars_of(ax) -> list:
    """The error bars, each with its line, caps and bars."""
    return [c for c in ax.containers if type(c).__name__ == "ErrorbarContainer"]


def points_of(ax) -> set[tuple[float, float]]:
    return {tuple(np.round(point, 9).tolist()) for bar in bars_of(ax) for point in bar[0].get_xydata()}


def special_of(ax) -> list:
    """The bars in the colour of the concept."""
    return [bar for bar in bars_of(ax) if to_hex(bar[0].get_color()).upper() == plots.PALETTE["concept"]]


@pytest.mark.parametrize("cells", [CELLS, ("only cell",), ("delta=0.5", "delta=2")], ids=len)
def test_grid_curve_shows_every_cell_in_its_order_and_the_choice(cells):
    frame, choice = grid_frame(cells), cells[-1]
    ax = plots.grid_curve(frame, choice=choice)
    assert labels_of(ax.xaxis) == [cell.replace(" ", "\n") for cell in cells]
    assert set(legend_of(ax)) == {*(plots.LABELS[metric] for metric in SCORES), "chosen"}
    assert len(bars_of(ax)) == 4 and all(len(bar[0].get_xdata()) == len(cells) for bar in bars_of(ax))
    (span,) = (patch for patch in ax.patches if patch.get_label() == "chosen")
    middle = (span.get_extents().transformed(ax.transData.inverted()).intervalx).mean()
    assert middle == pytest.approx(len(cells) - 1, abs=1e-6)
    for metric, bar in zip(SCORES, bars_of(ax), strict=True):
        assert bar[0].get_ydata().tolist() == pytest.approx(frame[frame.metric == metric].value.tolist())


def test_trade_off_shows_every_cell_the_base_model_and_the_choice():
    frame = grid_frame()
    ax = plots.trade_off(frame, by="cell", choice=CELLS[1])
    wide = frame.pivot(index="cell", columns="metric", values="value")
    expected = {(round(r.specificity_cont, 9), round(r.efficacy_cont, 9)) for r in wide.itertuples()}
    assert points_of(ax) == expected and len(expected) == len(CELLS)
    assert legend_of(ax) == ["base model", *(f"{cell} (chosen)" if cell == CELLS[1] else cell for cell in CELLS)]
    markers = [bar[0].get_marker() for bar in bars_of(ax)]
    assert len(set(markers)) == len(CELLS)
    assert markers == [line.get_marker() for line in ax.get_legend().get_lines()[1:]]
    assert any((line.get_xdata()[:1], line.get_ydata()[:1]) == ([1], [0]) for line in ax.lines)
    assert [bar[0].get_xdata()[0] for bar in special_of(ax)] == [wide.specificity_cont[CELLS[1]]]
    # Without a choice, where it is told; of a large grid only the choice has a name.
    own = plt.subplots()[1]
    ax = plots.trade_off(frame.rename(columns={"cell": "arm"}), by="arm", ax=own)
    assert ax is own and legend_of(ax) == ["base model", *CELLS] and not special_of(ax)
    ax = plots.trade_off(grid_frame([f"mu={k}" for k in range(20)]), by="cell", choice="mu=11")
    assert legend_of(ax) == ["base model", "mu=11 (chosen)"] and len(points_of(ax)) == 20


@pytest.mark.parametrize("arms", [ARMS, ARMS[:1], ARMS[:3]], ids=len)
def test_grid_panels_have_one_panel_an_arm(arms):
    frames = [grid_frame(method=m, ember=e) for m, e in arms]
    chosen = pd.DataFrame([{"method": m, "ember": e, "cell": CELLS[k % 4]} for k, (m, e) in enumerate(arms)])
    figure = plots.grid_panels(pd.concat(frames), chosen)
    shown = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title() for ax in shown] == [f"{'EMBER + ' if e else ''}{m.upper()}" for m, e in arms]
    for k, (ax, frame) in enumerate(zip(shown, frames, strict=True)):
        assert len(points_of(ax)) == len(CELLS)
        (special,) = special_of(ax)
        assert [*special[0].get_ydata()] == [*frame[(frame.cell == CELLS[k % 4]) & (frame.metric == SCORES[0])].value]


def filled(bar) -> bool:
    return to_hex(bar[0].get_markerfacecolor()) != "#ffffff"


def test_arm_scores_have_a_panel_a_score_and_a_point_an_arm():
    figure = plots.arm_scores(arm_frame())
    axes = figure.axes
    assert [ax.get_title() for ax in axes] == [plots.LABELS[metric] for metric in SCORES]
    assert labels_of(axes[0].yaxis) == ["EMBER", "SNMF", "RMU"]
    for k, ax in enumerate(axes):
        assert len(bars_of(ax)) == len(ARMS)
        assert {round(x, 9) for x, _ in points_of(ax)} == {round(0.2 + 0.15 * k, 9)}
        assert [filled(bar) for bar in bars_of(ax)] == [True, False, True, False, True]
        base = {line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"}
        assert base == {0.0 if SCORES[k] in ("efficacy_cont", "final_cont") else 1.0}
    (legend,) = figure.legends  # below the panels, where it covers no point
    assert "base model" in [text.get_text() for text in legend.get_texts()]
    # What was not run is left out.
    assert [len(bars_of(ax)) for ax in plots.arm_scores(arm_frame([("ember", False), ("rmu", True)])).axes] == [2] * 4


@pytest.mark.parametrize("arms", [ARMS, ARMS[:1]], ids=len)
def test_arm_trade_off_leads_from_alone_to_after_ember(arms):
    frame = apart(arm_frame(arms).to_dict("records"))
    ax = plots.arm_trade_off(frame)
    assert len(points_of(ax)) == len(bars_of(ax)) == len(arms)
    wide = frame.pivot(index=["method", "ember"], columns="metric", values="value")
    place = wide[["specificity_cont", "efficacy_cont"]].T.to_dict("list")
    arrows = [text for text in ax.texts if text.arrow_patch is not None]
    assert {(*text.xyann, *text.xy) for text in arrows} == {(*place[m, False], *place[m, True]) for m, e in arms if e}
    assert {text.get_text() for text in ax.texts} - {""} == {m.upper() for m, _ in arms}
    assert sum(map(filled, bars_of(ax))) == sum(m == "ember" or e for m, e in arms)
    assert "base model" in legend_of(ax)


def test_ember_effect_has_a_panel_a_score_and_a_point_a_method():
    frame = pd.DataFrame([row for method in ("snmf", "rmu") for row in scored(method=method)])
    axes = plots.ember_effect(frame).axes
    assert [ax.get_title() for ax in axes] == [f"Δ {plots.LABELS[metric]}" for metric in SCORES]
    assert labels_of(axes[0].yaxis) == ["SNMF", "RMU"]
    for k, ax in enumerate(axes):
        assert points_of(ax) == {(round(0.2 + 0.15 * k, 9), 0.0), (round(0.2 + 0.15 * k, 9), 1.0)}
        assert any(line.get_linestyle() == "--" and line.get_xdata()[0] == 0 for line in ax.lines)


def test_every_method_has_a_colour_of_its_own_and_one_s_own_method_is_drawn_too():
    assert len({Arm(method).colour for method in METHODS}) == len(METHODS)
    own = arm_frame([("own", False), ("own", True)])
    assert len(bars_of(plots.arm_scores(own).axes[0])) == len(bars_of(plots.arm_trade_off(own))) == 2


@pytest.mark.parametrize("value", [0.15, 0.4])
def test_a_value_outside_its_interval_has_no_negative_bar(value):
    """Bootstrap percentiles need not hold the value; matplotlib refuses negative bars."""
    outside = {"value": value, "ci_low": 0.2, "ci_high": 0.3}
    plots.grid_curve(grid_frame().assign(**outside), choice=CELLS[0])
    plots.trade_off(grid_frame().assign(**outside), by="cell")
    plots.arm_scores(arm_frame().assign(**outside))
    plots.arm_trade_off(arm_frame().assign(**outside))
    plots.ember_effect(arm_frame([("rmu", False)]).assign(**outside))
    plots.interval_bars(pd.DataFrame([{"label": "x", **outside}]), title="t", xlabel="x", base=0.0)


def test_figures_of_a_fit_and_its_features():
    assert legend_of(feature_plots.loss_curve([8.0, 4.0, 2.0, 3.0], total=10.0)) == ["kept: 0.200"]
    numbers = {"feature": range(6), "score": np.linspace(2, 0.1, 6), "ratio_abs": np.linspace(5, 0, 6)}
    features = pd.DataFrame({**numbers, "top_tokens": [" ".join(f"t{k}{i}" for i in range(12)) for k in range(6)]})
    ax = feature_plots.feature_scores(features, threshold=0.6, selected=[0, 2], top=4)
    assert labels_of(ax.yaxis) == [f"feature {k}" for k in range(4)]
    colours = [to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
    assert [colour == plots.PALETTE["concept"] for colour in colours] == [True, False, True, False]
    ax = feature_plots.role_composition(features, selected=[0, 2])
    assert [len(c.get_offsets()) for c in ax.collections] == [4, 2]
    frame = pd.DataFrame({"token": [" Rome", "x"], "change": [1.0, 0.2], "norm": 2.0, "ordinary": [False, True]})
    ax = feature_plots.token_preview(frame)
    assert labels_of(ax.yaxis) == ["␣Rome", "x"]
    assert [bar.get_width() for bar in ax.patches[:2]] == [0.5, 0.1]
    sizes = {"concept": 9, "simdom": 5, "general": 7}
    changes = pd.DataFrame([(name, -0.1 * k) for name, n in sizes.items() for k in range(n)], columns=["set", "change"])
    ax = feature_plots.item_changes(changes)  # every question
    assert [len(c.get_offsets()) for c in ax.collections if len(c.get_offsets()) > 1] == list(sizes.values())
    assert [label.split("n = ")[1] for label in labels_of(ax.xaxis)] == ["9)", "5)", "7)"]


def test_interval_bars_show_base_and_labels_and_a_text_panel_what_was_said():
    rows = pd.DataFrame({"label": ["a", "b"], "value": [0.1, 0.3], "ci_low": 0.0, "ci_high": 0.5})
    ax = plots.interval_bars(rows, title="t", xlabel="x", base=0.0)
    assert labels_of(ax.yaxis) == ["a", "b"] and "base model" in legend_of(ax)
    ax = plots.text_panel(pd.DataFrame({"prompt": ["Who?"], "base": ["Caesar $5$ did."], "edited": [""]}))
    texts = {text.get_text() for text in ax.texts}
    assert texts == {"prompt", "base model", "edited model", "Who?", r"Caesar \$5\$ did.", "(nothing)"}
