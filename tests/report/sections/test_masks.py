from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from fabricated_run import make_methods_run

import nspec
from nspec import analysis
from nspec.report.run_data import RunData, load_run
from nspec.report.sections import masks
from nspec.report.sections.variants import by_layer, stability


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return load_run(make_methods_run(tmp_path_factory.mktemp("runs") / "run", layers=3))


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_masked_share_stands_beside_the_published_one_at_relative_depth(data: RunData) -> None:
    encoder, decoder = masks.masked(data).axes
    x, y = lines(decoder)["en→x, this run (k = 0.95)"]
    tasks = [task for task in data.tasks if task.startswith("en-")]
    assert x == [0, 1, 2]
    assert y == pytest.approx(
        1 - analysis.density(data.masks, analysis.side_layers(data.masks, "decoder"), tasks).mean(0)
    )
    x, y = lines(encoder)["x→en, published (k = 0.95)"]
    assert y == masks.PUBLISHED_MASKED["to", "encoder"]
    assert x == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2])  # six layers over three


def test_layers_keep_their_numbers_where_only_some_are_specialised(data: RunData) -> None:
    assert data.masks is not None
    part = dataclasses.replace(data, masks=data.masks.only(["layers.2"]))
    own, base = data.masks.only(["decoder.layers.2"]), data.masks
    compared = stability("forward", own, base)
    assert compared is not None
    decoder = by_layer(data, [compared]).axes[1]
    assert lines(decoder)["forward"][0] == [2]
    assert decoder.lines[1].get_marker() == "_"  # one point has no line to be seen by
    drawn = lines(masks.masked(part).axes[1])
    assert drawn["en→x, this run (k = 0.95)"][0] == [2]
    assert not any("published" in label for label in drawn)  # of two layers left out


def test_iou_stands_beside_the_two_published_cases(data: RunData) -> None:
    encoder, decoder = masks.published_iou(data).axes
    assert lines(encoder)["published (k = 0.7)"][1] == masks.PUBLISHED_IOU["to", "encoder"]
    assert lines(decoder)["published (k = 0.7)"][1] == masks.PUBLISHED_IOU["from", "decoder"]
    nearest = data.variant_masks["forward-k70"]
    tasks = [task for task in data.tasks if task.endswith("-en")]
    own = analysis.mean_pairwise(analysis.layer_iou(nearest, analysis.side_layers(nearest, "encoder"), tasks))
    assert lines(encoder)["this run (k = 0.7)"][1] == pytest.approx(own)


def test_heat_map_shows_directions_in_named_blocks(data: RunData) -> None:
    axes = masks.heat(data, "encoder").axes[0]
    order = [label.get_text() for label in axes.get_yticklabels()]
    assert order[:6] == ["en-de", "en-nl", "en-es", "en-fr", "en-ru", "en-ar"]
    assert order[6:] == ["de-en", "nl-en", "es-en", "fr-en", "ru-en", "ar-en"]
    shown = np.asarray(axes.images[0].get_array())
    iou = analysis.layer_iou(data.masks, analysis.side_layers(data.masks, "encoder"), order).mean(0)
    assert shown[0, 7] == pytest.approx(iou[0, 7])
    names = [text.get_text() for text in axes.texts if text.get_text().isalpha() or "-" in text.get_text()]
    assert names == ["Germanic", "Romance", "Slavic", "Afro-Asiatic"] * 2
    across = [line.get_ydata()[0] for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[1]]
    assert across == [1.5, 3.5, 4.5, 5.5, 7.5, 9.5, 10.5]
    widths = {line.get_ydata()[0]: line.get_linewidth() for line in axes.lines if line.get_ydata()[0] in across}
    assert widths[5.5] > 2 * widths[1.5]


def test_published_iou_is_compared_with_the_masks_of_the_nearest_k(tmp_path: Path) -> None:
    data = load_run(make_methods_run(tmp_path / "run", layers=1))
    assert masks.PUBLISHED_IOU_K == 0.7
    chosen, k = masks.iou_masks(data, "from", "decoder")
    assert k == 0.7
    assert chosen is data.variant_masks["forward-k70"]
    data.config.select.k_from_decoder = 0.72
    data.variant_masks.clear()
    assert masks.iou_masks(data, "from", "decoder") == (data.masks, 0.72)
    assert masks.iou_masks(data, "to", "encoder") == (data.masks, 0.95)


def test_iou_beside_the_published_one_is_of_masks_of_its_k_where_the_run_has_counts(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", layers=2)
    generator = torch.Generator().manual_seed(0)
    own = load_run(run).masks
    assert own is not None
    draw = {
        task: {layer: torch.randint(0, 50, (len(mask),), generator=generator) for layer, mask in own[task].items()}
        for task in own.tasks
    }
    counts = nspec.ActivationCounts(draw)
    counts.save(run / "profile")
    data = load_run(run)
    chosen, k = masks.iou_masks(data, "to", "encoder")
    assert k == 0.7
    expected = nspec.select(counts, k=0.7)
    assert all(torch.equal(chosen[task][layer], expected[task][layer]) for task in own.tasks for layer in own.layers)
    rows = {row["name"]: row for row in masks.iou_rows(data)}
    assert list(rows) == ["Encoder, x→en", "Decoder, en→x", "Encoder, en→x", "Decoder, x→en"]
    tasks = [task for task in own.tasks if task.endswith("-en")]
    iou = analysis.mean_pairwise(analysis.layer_iou(chosen, analysis.side_layers(chosen, "encoder"), tasks))
    assert rows["Encoder, x→en"]["own"] == " ".join(f"{value:.2f}" for value in iou)
    assert rows["Encoder, x→en"]["published"] == " ".join(
        f"{value:.2f}" for value in masks.PUBLISHED_IOU["to", "encoder"]
    )
    assert rows["Encoder, en→x"]["published"] == "–"


def test_published_numbers_are_shares_of_six_layers() -> None:
    for table in (masks.PUBLISHED_MASKED, masks.PUBLISHED_IOU):
        assert all(len(values) == 6 and all(0 < value < 1 for value in values) for values in table.values())
    mean = [sum(values) / 6 for values in masks.PUBLISHED_MASKED.values()]
    assert 1 - sum(mean) / 4 == pytest.approx(0.78, abs=0.005)  # the density that these shares stand for
