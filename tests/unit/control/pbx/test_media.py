"""Values between calls and the data plane."""

import pytest

from control.pbx.media import LearnedSource, LocalPorts, first_port_of, still_learned
from control.pbx.records import LegName
from control.sip.address import Address
from tests.harness.media_specs import media_spec

FAR_END = Address("192.0.2.1", 4000)


@pytest.mark.parametrize("line", [0, 1])
def test_the_first_port_of_a_block_follows_from_any_line_of_the_caller(line: int) -> None:
    ports = (LocalPorts(LegName.CALLEE, 0, 10_012, 10_013), LocalPorts(LegName.CALLER, line, 10_008 + 2 * line, 0))
    assert first_port_of(ports) == 10_008


def test_the_first_port_cannot_be_told_without_the_callers_leg() -> None:
    with pytest.raises(ValueError, match="caller"):
        first_port_of((LocalPorts(LegName.CALLEE, 0, 10_012, 10_013),))


def test_what_was_learned_holds_while_the_far_end_is_where_it_was() -> None:
    source = LearnedSource(LegName.CALLER, 0, FAR_END, Address("192.0.2.1", 4444), None)
    elsewhere = LearnedSource(LegName.CALLEE, 0, FAR_END, Address("192.0.2.1", 4444), None)
    assert still_learned(media_spec(remote=FAR_END), [source, elsewhere]) == (source,)
    assert still_learned(media_spec(remote=Address("192.0.2.1", 4002)), [source]) == ()
    assert still_learned(media_spec(), [source]) == ()
