"""Figures of the later stages, and the fonts that can write what stands on them."""
import contextlib
import functools
import itertools
import logging
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from scores import Block, auroc, calibration_error, interval, nan_mean


class FigureText(NamedTuple):
    """Names as figures can write them."""
    style: dict[Any, Any]               # for rc_context: fonts that have all their characters
    written: dict[str, str]             # what stands in figures for each name
    legend: str                         # the names behind numbers, for results.md, or nothing


def figure_text(**names: list[str]) -> FigureText:
    """How figures write these names; the keyword says what they are: `label`, `row`.

    The font that matplotlib brings has no Chinese, to name one. Where another font of this
    system has the characters, it writes them; a name for which none has them would be a row of
    empty boxes, and becomes a number."""
    families, drawable = list(rcParams["font.family"]), set()
    characters = {c for name in itertools.chain(*names.values()) for c in name}
    missing = {c for c in characters if not c.isspace()}
    for family in (None, *_other_fonts(missing)):
        if not missing:
            break
        found = missing & _characters(family)
        if found and family:
            families.append(family)
        drawable, missing = drawable | found, missing - found
    # Without a library for it, matplotlib would write Arabic and Hebrew from the left.
    drawable -= {c for c in drawable if unicodedata.bidirectional(c) in ("R", "AL")}

    written, numbers = {}, []
    for what, group in names.items():
        for number, name in enumerate(group, 1):
            words = name.split()
            if drawable >= set("".join(words)):
                # A dollar would begin a formula, and a legend leaves out what begins with _.
                text = " ".join(words).replace("$", r"\$")
                written[name] = f" {text}" if text.startswith("_") else text
            else:
                written[name] = f"{what} {number}"
                numbers.append(f"{what} {number} is {' '.join(words)}")
    legend = f"\nIn the figures {', '.join(numbers)}.\n" if numbers else ""
    return FigureText({"font.family": families}, written, legend)


def _other_fonts(characters: set[str]) -> Iterator[str]:
    """Families of this system's fonts that have one of the characters, plain ones first."""
    default = _characters(None)
    if characters <= default:
        return
    codes = {ord(c) for c in characters - default}
    entries = sorted(font_manager.fontManager.ttflist,
                     key=lambda entry: (entry.style != "normal", entry.weight != 400))
    for entry in entries:
        # The last resort is a font of boxes.
        if not entry.name.startswith(("Last Resort", ".LastResort")):
            with contextlib.suppress(RuntimeError, OSError):        # not a font that can be read
                if codes & FT2Font(entry.fname).get_charmap().keys():
                    yield entry.name


@functools.cache
def _characters(family: str | None) -> set[str]:
    """What the font has that matplotlib takes for a family, or by default."""
    properties = font_manager.FontProperties(family=family)
    logger = logging.getLogger("matplotlib.font_manager")
    logger.disabled = True              # it would report that a family has no plain weight
    try:
        file = font_manager.findfont(properties, fallback_to_default=family is None)
    except ValueError:
        return set()
    finally:
        logger.disabled = False
    return {chr(code) for code in FT2Font(file).get_charmap() if code < 0x110000}


# A panel of more lines has no legend: nobody could read it, and no picture is that high.
MOST_ENTRIES = 100


def panels(rows: list[str], columns: list[str], entries: int,
           **style) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), in the one style of all figures.

    entries: how many lines the legend below each panel will have."""
    height = 5 + 0.18 * min(entries, MOST_ENTRIES)                          # inches
    figure = Figure((5 * len(columns), height * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for ax, (row, column) in zip(axes.flat, itertools.product(rows, columns)):
        ax.set(title=" ".join(filter(None, (row, column))), **style)
        ax.grid(alpha=0.3)
    return figure, axes


def legend_below(ax) -> None:
    """Where it hides nothing, however long the names: under the label of the x axis."""
    if 0 < len(ax.lines) <= MOST_ENTRIES:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5, fontsize=8,
                  frameon=False)


def efficiency_figure(blocks: list[Block], written: dict[str, str]) -> Figure:
    """Mean AUROC against the share of the labels, a panel for each mode; written: see FigureText.

    The band is the test patients' 95 % interval; a dot is one draw of the labelled images."""
    modes = list(dict.fromkeys(block.mode for block in blocks))
    figure, axes = panels([""], modes, len(blocks[0].inits), xscale="log",
                          xlabel="share of the labels", ylabel="mean AUROC on test")
    for ax, mode in zip(axes[0], modes):
        points = sorted((block for block in blocks if block.mode == mode),
                        key=lambda block: block.fraction)
        x = np.array([block.fraction for block in points])                  # (F,)
        for i, init in enumerate(blocks[0].inits):
            dots = np.array([block.rows[i].draws[:, -1] for block in points])       # (F, S)
            low, high = zip(*(interval(block.rows[i].pooled[-1, 1:]) for block in points))
            ax.plot(x, nan_mean(dots, 1), "-o", color=f"C{i}", label=written[init])
            ax.plot(x, dots, ".", color=f"C{i}", alpha=0.5)
            ax.fill_between(x, low, high, color=f"C{i}", alpha=0.15)
        ax.set_xticks(x, [f"{100 * fraction:g} %" for fraction in x])
        ax.minorticks_off()
        legend_below(ax)
    return figure


def calibration_figure(blocks: list[Block], truth: np.ndarray,
                       written: dict[str, str]) -> Figure:
    """How often a label is present when it was given a probability: a panel for each block, a
    line for each initialisation, all labels and draws together. truth (n, L)."""
    modes = list(dict.fromkeys(block.mode for block in blocks))
    fractions = list(dict.fromkeys(block.fraction for block in blocks))
    figure, axes = panels(modes, [f"{100 * fraction:g} %" for fraction in fractions],
                          1 + len(blocks[0].inits))
    for ax, block in zip(axes.flat, blocks):
        for row in block.rows:
            p = np.stack([run.probabilities for run in row.runs])           # (S, n, L)
            y = np.broadcast_to(truth, p.shape)
            p, y = p[~np.isnan(y)], y[~np.isnan(y)]
            name = f"{written[row.init]}, error {calibration_error(p, y):.3f}"
            CalibrationDisplay.from_predictions(y, p, n_bins=15, ax=ax, name=name)
        ax.set(xlabel="probability", ylabel="share of positives")
        legend_below(ax)
    return figure


def curves_figure(probabilities: np.ndarray, truth: np.ndarray, names: list[str]) -> Figure:
    """ROC and precision-recall curves, a line for each of L labels that has both classes.

    probabilities, truth (n, L)."""
    figure, axes = panels([""], ["ROC", "precision-recall"], len(names))
    roc, precision_recall = axes[0]
    for p, y, name in zip(probabilities.T, truth.T, names):
        p, y = p[~np.isnan(y)], y[~np.isnan(y)]
        if 0 < y.sum() < len(y):
            false_rate, true_rate, _ = roc_curve(y, p)
            roc.plot(false_rate, true_rate, label=f"{name}, area {auroc(p, y)[0]:.2f}")
            precision, recall, _ = precision_recall_curve(y, p)
            area = average_precision_score(y, p)
            precision_recall.plot(recall, precision, drawstyle="steps-post",
                                  label=f"{name}, area {area:.2f}")
    roc.set(xlabel="false positive rate", ylabel="true positive rate")
    precision_recall.set(xlabel="recall", ylabel="precision")
    for ax in axes.flat:
        legend_below(ax)
    return figure
