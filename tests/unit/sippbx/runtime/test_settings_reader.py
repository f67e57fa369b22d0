"""Reading settings from a file and the environment, shown on a small model."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from sippbx.runtime.settings_reader import ContradictionError, Fault, SettingsError, nearest_of, path_of, read


class Phone(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    kind: str = Field(default="desk", alias="type")
    password: SecretStr | None = None


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    low: int = Field(default=1, ge=0, le=10)
    high: int = 2
    gain: float | None = 0.5

    @model_validator(mode="after")
    def ordered(self) -> "Line":
        if self.low > self.high:
            raise ContradictionError([Fault(("high",), "is less than low"), Fault((), "has no room")])
        return self


class Desk(BaseModel):
    model_config = ConfigDict(extra="forbid")

    label: str = "none"
    line: Line = Line()
    spare: Line | None = None
    phones: tuple[Phone, ...] = ()
    tags: tuple[str, ...] = ()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "desk.yaml"


def desk(file: Path, text: str, environ: Mapping[str, str] | None = None) -> Desk:
    file.write_text(text)
    return read(Desk, file, "DESK_", environ or {})


def faults(file: Path, text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        desk(file, text, environ)
    assert str(caught.value) == "\n".join(caught.value.messages)
    return caught.value.messages


def test_without_file_and_variables_the_defaults_hold() -> None:
    assert read(Desk, None, "DESK_", {"LABEL": "x", "OTHER_LABEL": "x"}) == Desk()


def test_an_empty_file_and_an_empty_section_hold_the_defaults(file: Path) -> None:
    assert desk(file, "# nothing\n") == Desk()
    assert desk(file, "line:\n  # low: 1\n") == Desk()


@pytest.mark.parametrize("text", ["0100", "+82", "no", "1e3", "12:30:00", "2001-01-01", "0x10", "1_000"])
def test_scalars_mean_what_they_say_with_and_without_quotes(file: Path, text: str) -> None:
    assert desk(file, f"label: {text}").label == text
    assert desk(file, f"label: '{text}'").label == text


def test_models_give_scalars_their_types(file: Path) -> None:
    assert desk(file, "line: {low: 3, high: '10', gain: 1e-1}").line == Line(low=3, high=10, gain=0.1)


def test_null_is_nothing(file: Path) -> None:
    assert desk(file, "line: {gain: null}").line.gain is None


def test_anchors_and_merges_work(file: Path) -> None:
    text = "line: &one {low: 3, high: 4}\nspare: {<<: *one, high: 5}"
    assert desk(file, text).spare == Line(low=3, high=5)


def test_a_variable_wins_over_the_file_and_leaves_its_neighbours(file: Path) -> None:
    settings = desk(file, "label: a\nline: {low: 3, high: 4}", {"DESK_LINE__HIGH": "7"})
    assert (settings.label, settings.line) == ("a", Line(low=3, high=7))


def test_a_variable_s_scalar_is_taken_as_it_stands(file: Path) -> None:
    assert desk(file, "", {"DESK_LABEL": "[::1]:50 # no"}).label == "[::1]:50 # no"


def test_a_variable_may_hold_a_list_or_a_section(file: Path) -> None:
    environ = {"DESK_PHONES": '[{"name": "0100"}]', "DESK_TAGS": "[+1, no]", "DESK_SPARE": "{low: 2}"}
    settings = desk(file, "phones: [{name: x}, {name: y}]", environ)
    assert [phone.name for phone in settings.phones] == ["0100"]
    assert settings.tags == ("+1", "no")
    assert settings.spare == Line(low=2)


def test_a_variable_below_what_is_no_section_does_not_hide_that_fault(file: Path) -> None:
    assert "line: must hold keys and values" in faults(file, "line: 5", {"DESK_LINE__LOW": "3"})[0]


def test_everything_that_is_wrong_is_told_at_once(file: Path) -> None:
    text = "label: [a]\nline: {low: x, high: 1.5}\nphones: [{name: a}, {type: b}]\ntags: a"
    assert faults(file, text, {"DESK_LABLE": "a"}) == [
        "lable: unknown key in the environment variable DESK_LABLE; did you mean 'label'?",
        "label: must be a single value",
        "line.low: 'x' is not a whole number",
        "line.high: '1.5' is not a whole number",
        "phones[1].name: is required",
        "tags: must be a list, each entry on a line of its own behind '- '",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lable: a", "lable: unknown key; did you mean 'label'?"),
        ("zzz: a", "zzz: unknown key; there are: label, line, phones, spare, tags"),
        ("spare: {hihg: 1}", "spare.hihg: unknown key; did you mean 'high'?"),
        ("phones: [{name: a, typ: b}]", "phones[0].typ: unknown key; did you mean 'type'?"),
        ("phones: [{name: a, kind: b}]", "phones[0].kind: unknown key; there are: name, password, type"),
        ("line: {low: -1}", "line.low: -1 is too little; it must be at least 0"),
        ("line: {low: 11}", "line.low: 11 is too much; it must be at most 10"),
        ("line: {gain: loud}", "line.gain: 'loud' is not a number"),
    ],
)
def test_a_fault_names_the_path_of_its_key(file: Path, text: str, message: str) -> None:
    assert faults(file, text) == [message]


def test_contradictions_are_told_relative_to_their_section(file: Path) -> None:
    expected = ["spare.high: is less than low", "spare: has no room"]
    assert faults(file, "spare: {low: 5}") == expected


def test_a_fault_in_a_variable_names_the_variable(file: Path) -> None:
    environ = {"DESK_LINE__LOW": "x", "DESK_PHONES": "[{nam: a}]"}
    assert faults(file, "", environ) == [
        "line.low: 'x' is not a whole number (set by DESK_LINE__LOW)",
        "phones[0].name: is required (set by DESK_PHONES)",
        "phones[0].nam: unknown key; did you mean 'name'? (set by DESK_PHONES)",
    ]


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("DESK_LINE__LOWW", "line.loww: unknown key in the environment variable DESK_LINE__LOWW; did you mean 'low'?"),
        ("DESK_LINE_LOW", "line_low: unknown key in the environment variable DESK_LINE_LOW; did you mean 'line'?"),
        (
            "DESK_PHONES__0__NAME",
            "phones.0: unknown key in the environment variable DESK_PHONES__0__NAME; a list is set as a whole",
        ),
        ("DESK_LABEL__X", "label.x: unknown key in the environment variable DESK_LABEL__X; 'label' has no keys"),
    ],
)
def test_a_variable_that_names_no_key_is_refused(file: Path, variable: str, message: str) -> None:
    assert faults(file, "", {variable: "1"}) == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label: a\nlabel: b", "line 2: 'label' is set twice"),
        ("line:\n  low: 1\n  low: 2", "line 3: 'low' is set twice"),
        ("label: [", "line 1: "),
        ("- a", "must hold keys and values"),
        ("label: \x07", "special characters are not allowed"),
        ("label: !!python/object:os.system a", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused_with_the_line(file: Path, text: str, message: str) -> None:
    (fault,) = faults(file, text)
    assert fault.startswith(f"{file}: ")
    assert message in fault


def test_a_variable_that_is_no_yaml_is_refused_by_its_name(file: Path) -> None:
    assert faults(file, "", {"DESK_PHONES": "[{"})[0].startswith("DESK_PHONES: line 1: ")


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read(Desk, tmp_path / "none.yaml", "DESK_", {})
    (tmp_path / "binary.yaml").write_bytes(b"label: \xff\xfe")
    with pytest.raises(SettingsError, match="cannot be read"):
        read(Desk, tmp_path / "binary.yaml", "DESK_", {})


@pytest.mark.parametrize(
    "text",
    [
        "phones: [{name: a, pasword: hunter2}]",
        "phones: [{name: a, password: [hunter2]}]",
        "phones: [{password: hunter2}]",
        "phones: {password: hunter2}",
    ],
)
def test_no_message_shows_a_secret(file: Path, text: str) -> None:
    assert "hunter2" not in "".join(faults(file, text))


def test_paths_are_written_as_in_the_file() -> None:
    assert path_of(("trunks", 1, "trusted", 0)) == "trunks[1].trusted[0]"


def test_the_nearest_of_nothing_is_nothing() -> None:
    assert nearest_of("a", set()) == "there are none"
