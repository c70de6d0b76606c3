"""Generated blocks of a document."""

import pytest

from ember.errors import EmberError
from ember.reporting.format import fill_blocks


def test_blocks_are_filled_in_place_and_filling_again_changes_nothing():
    text = "a <!-- n -->old<!-- /n --> b\n<!-- t -->\nold\nolder\n<!-- /t -->\nc <!-- n -->x<!-- /n -->"
    text += " <!-- o -->1<!-- /o -->"
    blocks = {"n": "7", "t": r"| \d | \1 |" + "\n| - |"}
    filled = fill_blocks(text, blocks)
    assert filled == (
        "a <!-- n -->7<!-- /n --> b\n<!-- t -->\n| \\d | \\1 |\n| - |\n<!-- /t -->\nc <!-- n -->7<!-- /n --> "
        "<!-- o -->1<!-- /o -->"  # not named: stays
    )
    assert fill_blocks(filled, blocks) == filled


@pytest.mark.parametrize("text", ["", "<!-- a -->1", "<!-- /a --><!-- a -->"])
def test_a_missing_block_is_an_error(text):
    with pytest.raises(EmberError, match="'a'"):
        fill_blocks(text, {"a": "1"})
