"""The table of mutants keeps up with the code that it breaks."""

from __future__ import annotations

from pathlib import Path

from mutations import MUTATIONS, ROOT


def test_every_mutant_names_one_place() -> None:
    """And a test that is to see it; what it puts there is something else."""
    tests = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    for mutation in MUTATIONS:
        found = (ROOT / mutation.file).read_text().count(mutation.old)
        assert found == 1, f"{mutation.name}: found {found} times in {mutation.file}"
        assert mutation.new != mutation.old, mutation.name
        assert mutation.test in tests, f"{mutation.name}: there is no {mutation.test}"
        assert mutation.on in ("", "cuda", "triton"), mutation.name


def test_the_readme_says_what_each_goes_red_in() -> None:
    """Once, in the order of the table."""
    lines = (ROOT / "tests/README.md").read_text().splitlines()
    start = lines.index("| mutation | goes red in |") + 2
    end = lines.index("", start)
    listed = [line.split("|")[1].strip() for line in lines[start:end]]
    assert listed == [mutation.name for mutation in MUTATIONS]
