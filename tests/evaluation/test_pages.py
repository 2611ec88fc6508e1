import re

import pytest

from apudae.evaluation import pages
from apudae.evaluation.pages import with_tables

GRAY = "gray_box mnist.csv mnist/classifier mnist/dae"


def page(marker, before="Prose.", after="More."):
    return f"{before}\n\n<!-- table: {marker} -->\n\nold\n\n<!-- end of table -->\n\n{after}\n"


def test_a_table_is_made_anew_and_prose_stays():
    made = with_tables(page(GRAY))
    assert re.search(r"\| pgd \|", made)
    assert "old" not in made
    assert made.startswith("Prose.\n\n<!-- table: ")
    assert made.endswith("<!-- end of table -->\n\nMore.\n")
    assert with_tables(made) == made


def test_line_ends_of_another_system_stay():
    made = with_tables(page(GRAY).replace("\n", "\r\n"))
    assert made == with_tables(page(GRAY)).replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("marker", "named"),
    [
        (f"{GRAY} 16", "mnist.csv has no row of this study with n = 16 and α = 0.01"),
        (f"{GRAY} 15,16", "n = 16"),
        (f"{GRAY} 15 0.011", "n = 15 and α = 0.011"),
        (f"{GRAY} fifteen", "'fifteen'"),
        (
            'gray_box cifar10-jpeg.csv cifar10-jpeg/adversarial cifar10/residual_unet_10 ""',
            "cifar10-jpeg.csv has no purifier before cifar10-jpeg/adversarial with cifar10/residual_unet_10",
        ),
        (f"{GRAY} 15 small", "'small'"),
        (f"{GRAY} 15 0.01 top-2", "metric of mnist.csv 'top-2' is unknown; there is: top-1"),
        ("gray_box mnist.csv mnist/nobody mnist/dae", "classifier of mnist.csv 'mnist/nobody' is unknown; there is: "),
        ("gray_box mnist.csv mnist/classifier mnist/nobody", "dae of mnist.csv 'mnist/nobody' is unknown; there is: "),
        ("gray_box nothing.csv mnist/classifier mnist/dae", "nothing.csv"),
        ("gray_box mnist.csv", "missing a required argument: 'classifier'"),
        ("suite mnist.csv", "too many positional arguments"),
        ("gray-box mnist.csv", "kind of table 'gray-box' is unknown; there is: suite, gray_box"),
        ("gray_box 'mnist.csv", "No closing quotation"),
    ],
)
def test_a_table_that_cannot_be_is_named_with_its_page_and_line(marker, named):
    with pytest.raises(ValueError, match=f"^README.md, line 3, <!-- table: {re.escape(marker)} -->: .*{named}") as said:
        with_tables(page(marker), "README.md")
    assert "\n" not in str(said.value)


def test_a_marker_without_its_other_half_is_named_and_eats_no_prose():
    start, end = f"<!-- table: {GRAY} -->\n", "<!-- end of table -->\n"
    texts = {f"a\n{start}b\n": 2, f"{start}b\n{start}c\n{end}": 3, f"a\nb\n{end}": 3, f"{start}{end}c\n{end}": 4}
    for text, line in texts.items():
        with pytest.raises(ValueError, match=f"^it.md, line {line}, .*: its other marker is missing"):
            with_tables(text, "it.md")


def test_a_page_that_cannot_be_made_stays_as_it_is(tmp_path, monkeypatch):
    file = tmp_path / "it.md"
    file.write_bytes(page(GRAY).replace("\n", "\r\n").encode() + f"<!-- table: {GRAY} -->\r\n".encode())
    monkeypatch.setattr(pages, "pages", lambda: [file])
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"^it\.md, line 10"):
        pages.main()
    assert file.read_bytes() == before
    file.write_bytes(page(GRAY).replace("\n", "\r\n").encode())
    pages.main()
    assert file.read_bytes() == with_tables(page(GRAY)).replace("\n", "\r\n").encode()
