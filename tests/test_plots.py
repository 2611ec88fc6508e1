"""Figures: what a reader could not read if it were drawn otherwise."""

from conftest import images

from apudae import plots


def test_headings_of_an_image_strip_fit_their_column_and_stay_whole():
    names = ["clean", "autoattack", "deepfool<br>unclipped", *(f"attack {number}" for number in range(9))]
    figure = plots.image_strip({name: images(1, 1, 8, 8) for name in names}, {}, "twelve columns")
    lines = [line for heading in figure.layout.annotations for line in heading.text.split("<br>")]
    assert {"autoattack", "deepfool", "unclipped"} <= set(lines)
    column = (figure.layout.width - 90) / len(names)
    assert plots.image_strip({"": images(1, 1, 8, 8)}, {}, "no heading").data
    assert all(
        0.6 * len(line) * heading.font.size <= column + 1e-9 for line in lines for heading in figure.layout.annotations
    )
