"""`curvlab explain`: every name has its page, and a page as text says what the markdown says.

Compared with a reference: the words of the text with those of the markdown, tables of known layout, the shipped files.
Behavioural: which names are found, what is suggested for others, and that help and shipped pages import no torch.
"""

import re
import subprocess
import sys
from collections import Counter

import pytest

import curvlab as cl
from curvlab.claims import CLAIMS
from curvlab.cli.explaining import explain_command
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.diagnostics.registry import ALIASES
from curvlab.docs import FOLDER, TOPICS, docstrings, pages, quantity, shipped
from curvlab.docs.plain import plain
from curvlab.methods import METHODS
from curvlab.regularizers import REGULARIZERS

MARKDOWN = {**{p.stem: p.read_text() for p in FOLDER.rglob("*.md")}, **{n: pages.find(n) for n in [*METHODS, *CLAIMS]}}
NAMES = [*quantity.names(), *METHODS, *CLAIMS, *TOPICS]


def explained(capsys, *arguments: str) -> str:
    assert explain_command(list(arguments)) == 0
    return capsys.readouterr().out


# Markdown as text


def words(text: str) -> Counter:
    return Counter(re.findall(r"\w+", text))


@pytest.mark.parametrize("name", MARKDOWN)
def test_text_has_the_words_of_the_markdown_in_lines_that_fit(name):
    markdown = re.sub(r"<!--.*?-->\n", "", MARKDOWN[name])  # which no one sees
    text = plain(MARKDOWN[name])
    linked = re.sub(r"\]\((\w+)\.md\)", r"] curvlab explain \1", markdown.replace("```python", "```"))
    assert words(text) == words(linked.replace("`", ""))
    code = {
        f"    {line}" for block in re.findall(r"```python\n(.*?)```", markdown, re.S) for line in block.splitlines()
    }
    prose = [line for line in text.splitlines() if line not in code and not line.startswith("    ")]
    assert all(len(line) <= 100 or " " not in line[60:] for line in prose), max(prose, key=len)
    assert not [line for line in prose if "`" in line or "**" in line or "](" in line]
    assert code <= set(text.splitlines()) | {"    "}


def test_layout_of_a_page():
    markdown = (
        "# A *title* of `code`\n\nSome **bold** words that are wrapped, x_1 * y_1 * z_1 kept.\n\n"
        "- one item, wrapped\n- two\n\n> said\n\n<!-- no one sees this -->\n\n"
        "| name | meaning |\n| --- | --- |\n| R̄ | a \\| b |\n| `long_name` | of several words |\n\n"
        "    as | it * is\n\n```python\nx = 1\n\n# not a title\n```\n\nSee [errors](errors.md), [a](https://b.c)."
    )
    assert plain(markdown, 28) == (
        "A title of code\n===============\n\nSome bold words that are\nwrapped, x_1 * y_1 * z_1\nkept.\n\n"
        "- one item, wrapped\n- two\n\n  said\n\n"
        "name       meaning\n---------  ----------------\nR̄          a | b\nlong_name  of several words\n\n"
        "    as | it * is\n\n    x = 1\n\n    # not a title\n\nSee errors (curvlab explain\nerrors), a (https://b.c).\n"
    )


def test_columns_give_way_until_a_table_fits():
    rows = [["short", "long " * 12], ["longer cell", "unbreakable_name"]]
    markdown = "\n".join(f"| {a} | {b} |" for a, b in [["a", "b"], ["---", "---"], *rows])
    for width in (30, 40, 80):
        lines = plain(markdown, width).splitlines()
        assert max(map(len, lines)) <= width
        start = lines[1].index("  ") + 2
        assert all(line[start - 2 : start].strip() == "" for line in lines)  # the gap between the columns
        assert words("\n".join(lines)) == words(markdown)


# Docstrings as markdown


def documented():
    """What it is, in
    two lines.

    Error: of ``its`` own.

    Args:
        a, b: two of them,
            on two lines.
        c: another.

    Source: here, eq. 1.

    Example:
        >>> x = 1
        >>> x
        1
    """


def test_parts_of_a_docstring():
    parts = docstrings.sections(documented)
    assert list(parts) == ["", "Error", "Args", "Source", "Example"]
    assert docstrings.prose(parts["Error"]) == "Of `its` own."
    assert docstrings.entries(parts["Args"]) == {
        "a": "two of them, on two lines.", "b": "two of them, on two lines.", "c": "another."
    }  # fmt: skip
    assert docstrings.page("name", ["lead"], documented) == (
        "# name\n\nlead\n\nWhat it is, in two lines.\n\n## Error\n\nOf `its` own.\n\n## Args\n\n"
        "- `a`: two of them, on two lines.\n- `b`: two of them, on two lines.\n- `c`: another.\n\n"
        "## Source\n\nHere, eq. 1.\n\n## Example\n\n```python\nx = 1\nx\n```\n"
    )


def test_only_words_get_a_capital():
    assert [docstrings.prose(text) for text in ("the value", "k + 1 pairs", "gᵀHg is", "x")] == [
        "The value", "k + 1 pairs", "gᵀHg is", "x"
    ]  # fmt: skip
    assert docstrings.sections(int.from_bytes)[""]
    assert docstrings.sections(type("Silent", (), {}))[""] == ""


# Names


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_page(name, capsys):
    page = explained(capsys, name, "--markdown")
    assert page.startswith("# ")
    if shipped(name):
        assert page == MARKDOWN[name]
    else:
        assert page.splitlines()[0] == f"# {name}"
    assert explained(capsys, name) == plain(page)


def test_other_names_of_the_same_page(capsys):
    for alias, name in ALIASES.items():
        page = explained(capsys, alias, "--markdown")
        assert page == MARKDOWN[name]
        assert f"`{alias}`" in page
    assert explained(capsys, "implicit-regularizer") == explained(capsys, "implicit_regularizer")
    assert explained(capsys, "unit_jacobian") == explained(capsys, "unit_jacobian_penalty")
    trained = explained(capsys, "trained/gradient_noise_interaction", "--markdown")
    assert trained.startswith("`trained/instability` is the quantity below of the objective that is trained")
    assert trained.endswith(MARKDOWN["instability"])


def test_a_penalty_beside_a_quantity_of_its_name(capsys):
    for name in ("gradient_norm", "fisher_trace"):
        assert f"The penalty of this name is {name}_penalty." in explained(capsys, name)
    for name, entry in REGULARIZERS.items():
        page = explained(capsys, name, "--markdown")
        assert ("No value where" in page) == bool(entry.needs)
        assert ("Draws" in page) == bool(entry.draws)
        assert ("no second derivative." in page) == entry.first_order


def test_methods_and_claims_say_how_they_are_used(capsys):
    assert "cl.methods.NStepSGD(params, lr, *, n); on the command line curvlab run --method n_step_sgd" in explained(
        capsys, "n_step_sgd"
    ).replace("\n", " ")
    for name in CLAIMS:
        assert re.search(r"\bholds\b|\brule\b|^As ", explained(capsys, name), re.I | re.M), name
    assert "Judged on several runs" in explained(capsys, "iir")
    assert "Judged on a run" in explained(capsys, "edge_of_stability")


@pytest.mark.parametrize(
    "name, hint",
    [("sharpnes", "did you mean sharpness"), ("trained/instabilty", "instability"), ("glosary", "glossary"),
     ("zzzzqqq", "no such quantity, penalty, method, claim, preset or topic")],
)  # fmt: skip
def test_unknown_names(name, hint):
    with pytest.raises(ValueError, match=f"nothing to explain under '{name}'.*{hint}.*`curvlab explain` lists all"):
        explain_command([name])


@pytest.mark.parametrize("name", ["../changelog", "__init__", "quantities/sharpness", "/etc/hosts"])
def test_a_name_is_not_a_path(name):
    assert shipped(name) is None


def test_without_a_name_everything_is_listed(capsys):
    listed = explained(capsys)
    assert set(NAMES) | set(REGULARIZERS) <= set(re.findall(r"^(\S+)  ", listed, re.M))
    assert explained(capsys, "--markdown").startswith("# curvlab explain NAME")


def test_a_diagnostic_of_ones_own_is_explained(capsys):
    @cl.diagnostic("2L", formula="twice the loss", kind="exact", cost="1 gradient, shared", needs=["lr"])
    def twice_the_loss(at, *, offset=0.5):
        """Twice as much."""
        return cl.Measurement(2 * float(at.value) + offset)

    try:
        page = explained(capsys, "twice_the_loss", "--markdown")
        exec(quantity.example("twice_the_loss"), {})
    finally:
        del DIAGNOSTICS["twice_the_loss"]
    assert capsys.readouterr().out.startswith("5.")
    assert "## Cost\n\n1 gradient, shared.\n\n" in page  # nothing was counted
    assert "- needs `lr`: pass lr=0.1" in page
    assert "| `offset` | `0.5` |  |" in page
    assert "## When it fails" not in page


@pytest.mark.parametrize("argument", ["--help", "sharpness", "errors"])
def test_help_and_shipped_pages_import_no_torch(argument):
    code = (
        "import sys\nfrom curvlab.cli.explaining import explain_command\n"
        f"try: explain_command([{argument!r}])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5
