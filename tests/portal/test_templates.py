"""What the formatter of templates (`make check`) leaves: Django's tags, as long as they are."""

from tests.support import ROOT

WIDTH = 120  # columns, as in pyproject.toml, [tool.djangofmt]


def test_no_line_of_a_template_is_too_long():
    files = [*(ROOT / "templates").glob("**/*.*"), *ROOT.glob("*/templates/**/*.*")]
    assert len(files) > 40
    long = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert long == []
