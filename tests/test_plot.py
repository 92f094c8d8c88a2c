"""Pictures of relations: what is drawn is what was given, and what cannot be drawn is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from renyi_kd import RelationModule
from renyi_kd.plot import relation_figure

TITLES = ("early", "late")


@pytest.fixture
def relations():
    return {title: torch.randn(3, 2, 4, 6) for title in TITLES}


def test_every_map_is_drawn_in_its_place(relations):
    figure = relation_figure(relations)
    # Three samples of two columns, and a histogram below each column.
    maps, histograms = figure.axes[:6], figure.axes[6:]
    assert [ax.get_title() for ax in maps[:2]] == list(TITLES)
    for index, ax in enumerate(maps):
        sample, title = index // 2, TITLES[index % 2]
        (image,) = ax.get_images()
        np.testing.assert_allclose(image.get_array(), relations[title][sample, 0])
    assert len(histograms) == 2
    for title, ax in zip(TITLES, histograms, strict=True):
        heights = np.array([bar.get_height() for bar in ax.patches])
        width = ax.patches[0].get_width()
        counts = np.round(heights * width * relations[title][:, 0].numel())
        assert counts.sum() == relations[title][:, 0].numel()


def test_maps_of_one_sample_share_their_colours_and_histograms_their_axes(relations):
    relations["late"][1] *= 10
    figure = relation_figure(relations)
    limits = [ax.get_images()[0].get_clim() for ax in figure.axes[:6]]
    assert limits[0] == limits[1]
    assert limits[2] == limits[3]
    assert limits[2][1] == pytest.approx(max(values[1, 0].abs().max().item() for values in relations.values()))
    assert limits[2] != limits[0]
    assert figure.axes[6].get_xlim() == figure.axes[7].get_xlim()
    assert figure.axes[6].get_ylim() == figure.axes[7].get_ylim()


def test_images_come_first_and_a_module_s_maps_are_taken(tmp_path):
    maps = RelationModule(8)(torch.randn(2, 8, 5, 5), torch.randn(2, 1, 8))
    images = torch.rand(2, 3, 10, 12)
    figure = relation_figure({"now": maps}, images)
    assert [ax.get_images()[0].get_array().shape for ax in figure.axes[:4]] == [(5, 5), (10, 12, 3)] * 2
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_relation_of_zeros_can_be_drawn():
    relation_figure({"collapsed": torch.zeros(2, 3, 3)}).canvas.draw()


@pytest.mark.parametrize(
    ("relations", "said"),
    [
        ({}, "relations must hold maps of one shape, got none"),
        ({"a": torch.ones(1, 2, 2), "b": torch.ones(1, 3, 3)}, r"of one shape, got \[\(1, 2, 2\), \(1, 3, 3\)\]"),
        ({"a": torch.ones(2, 2)}, r"maps \[s, h, w\] or \[s, n, h, w\], got \(2, 2\) for 'a'"),
        ({"a": [[1]]}, "got list for 'a'"),
    ],
)
def test_what_is_no_map_is_refused(relations, said):
    with pytest.raises(ValueError, match=said):
        relation_figure(relations)


def test_images_that_do_not_belong_are_refused(relations):
    with pytest.raises(ValueError, match=r"images must have shape .* = \[3, 3, H, W\], got \(2, 3, 8, 8\)"):
        relation_figure(relations, torch.rand(2, 3, 8, 8))


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, renyi_kd.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_matplotlib_the_error_names_the_extra(relations, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'renyi-kd\[plot\]'"):
        relation_figure(relations)
