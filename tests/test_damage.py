"""Damage to files on disk is seen. The small form."""

from pathlib import Path

from tests.torture import damage


def test_bits_that_flip_and_files_that_end_early_never_pass_for_what_was_there(tmp_path: Path) -> None:
    found = damage.damages(300, 0, tmp_path)
    assert min(found[each] for each in ("complete", "refused", "earlier")) > 0
