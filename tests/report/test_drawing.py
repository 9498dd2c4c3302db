"""What all figures share."""

import warnings

import numpy as np

from nspec.report import drawing


def test_a_tree_of_languages_that_keep_the_same_neurons_is_drawn_without_a_warning() -> None:
    linkage = np.array([[0, 1, 0.0, 2], [2, 3, 0.0, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = drawing.tree(linkage, ["de", "fr", "cs"], ["Germanic", "Romance", "Slavic"], "encoder")
    assert figure.axes[0].get_xlim() == (1.0, 0.0)
