"""What YAML and `key=value` mean, and what of it is refused."""

from itertools import pairwise

import pytest

from megatron.config.yaml_file import parse, parse_value


def values(text):
    entries = parse(text, "a.yml")
    assert entries.problems == []
    return entries.values


def problem(text):
    (only,) = parse(text, "a.yml").problems
    return only


def test_a_merge_key_adds_what_the_group_does_not_write_itself_wherever_it_is():
    text = "x: &x {lr: 1, eps: 2, deep: {a: 1}}\ny:\n  lr: 3\n  <<: *x\n  deep: {b: 2}\n"
    assert values(text)["y"] == {"lr": 3, "eps": 2, "deep": {"b": 2}}


def test_of_several_merged_groups_the_first_wins_and_merges_may_be_nested():
    text = "x: &x {lr: 1, eps: 2}\ny: &y {lr: 3, <<: *x, k: 9}\nz: {<<: [*y, *x], eps: 7}\n<<: {seed: 5}\n"
    assert values(text)["z"] == {"lr": 3, "k": 9, "eps": 7}
    assert values(text)["seed"] == 5


def test_a_merged_key_is_the_same_with_dashes_and_keeps_the_line_it_was_written_in():
    entries = parse("x: &x\n  weight-decay: 1\n  lr: 2\ny:\n  weight_decay: 3\n  <<: *x\n", "a.yml")
    assert entries.values["y"] == {"weight_decay": 3, "lr": 2}
    assert str(entries.location(("y", "lr"))) == "a.yml:3"
    assert str(entries.location(("y", "weight_decay"))) == "a.yml:5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("z: {<<: 5}", 'a.yml:1: "<<" merges groups of keys'),
        ("x: &x {a: 1}\nz: {<<: [*x, 7]}", 'a.yml:2: "<<" merges groups of keys'),
        ("x: &x {a: 1}\nz:\n  <<: *x\n  <<: *x", 'a.yml:4: a second "<<" in one group'),
        ("seed: 1\na: &a\n  b: *a", "a.yml:2: this group or list contains an alias (*) to itself"),
        ("a: &a [1, *a]", "a.yml:1: this group or list contains an alias"),
        ("a: &a\n  <<: *a", "a.yml:1: this group or list contains an alias"),
        ("&a x: {b: &b {c: *b}}", "a.yml:1: this group or list contains an alias"),
        ("a: *b", "undefined alias"),
        ("a: " + "[" * 60 + "]" * 60, "a.yml:1: groups and lists are nested more than 50 deep"),
        ("a: " + "[" * 5000, "groups and lists are nested more than 50 deep"),
        ("a: " + "9" * 5000, "a.yml:1: a number of 5000 digits is too large"),
        ("a: 0x" + "f" * 5000, "a number of 5002 digits is too large"),
        ("a: !env HOME", "a.yml:1: the tag !env is not supported"),
        ("a: !!float abc", 'a.yml:1: "abc" is not of the type that its tag names (float)'),
        ("a: 1\n---\nb: 2", 'a.yml:2: this is not YAML: a second document begins here ("---")'),
        ("a:\n\tb: 1", "a.yml:2: this is not YAML: a tab; YAML indents with spaces"),
        ("a: @x", "put the text in quotation marks"),
        ("a: {{ x }}", "a.yml:1: a group or list in the place of a key"),
        ("a: 1\nb: \x07", "a.yml:2: this is not YAML: the character U+0007 is not allowed"),
        (r'a: "\ud83d"', 'a.yml:1: "\\ud83d" has half of a character'),
    ],
)
def test_what_cannot_be_read_is_one_line_with_file_and_line(text, message):
    found = problem(text)
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_stand_for_billions_of_values_are_refused_before_they_are_followed(form):
    """Following them would take hours and all memory: that this ends at all is the test."""
    names = "abcdefghijkl"
    lines = ["a: &a " + ("[1, 2]" if form == "[{}]" else "{x: 1}")]
    lines += [f"{k}: &{k} " + form.format(", ".join([f"*{old}"] * 9)) for old, k in pairwise(names)]
    assert "aliases (*) repeat more than 100,000 values" in problem("\n".join(lines))


def test_long_lists_without_aliases_are_no_bomb():
    assert len(values(f"a: [{', '.join(['1'] * 2000)}]")["a"]) == 2000


def test_values_are_those_of_yaml_1_2_and_dates_stay_text():
    text = "a: 010\nb: 0x10\nc: 1_000\nd: 12:30:10\ne: on\nf: 2024-01-01\ng: 1e3\nh: ~\ni: Null\nj: None\nk: 0o17\n"
    expected = {"a": 10, "b": 16, "c": 1000, "d": "12:30:10", "e": "on", "f": "2024-01-01", "g": 1000.0}
    assert values(text) == expected | {"h": None, "i": None, "j": "None", "k": 15}


def test_json_escapes_of_one_character_in_two_parts_are_that_character():
    assert values(r'{"prompt_end": "\ud83d\ude00"}') == {"prompt_end": "😀"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/try #1", "runs/try #1"),
        (" ###", "###"),
        ("#", "#"),
        ("#1: b", "#1: b"),
        ("a: b #2", "a: b #2"),
        ("5 # five", "5 # five"),
        ("a#b", "a#b"),
        ('"a # b"', "a # b"),
        ("'# a'", "# a"),
        ("[a, 'b # c']", ("a", "b # c")),
        ("&x y", "&x y"),
        ("a\nb", "a\nb"),
        ("a: 1\nb: 2", {"a": 1, "b": 2}),
        (r'"\n"', "\n"),
        ("", None),
        ("~", None),
        ("---", "---"),
        ("[1,\n2]", (1, 2)),
    ],
)
def test_no_text_of_a_value_on_the_command_line_is_dropped(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["[1, 2] # c", '"a" # b', "{a: 1} #", "[a, # b\n c]"])
def test_a_comment_behind_a_list_or_a_quotation_is_refused(text):
    with pytest.raises(ValueError, match="would be a comment"):
        parse_value(text)


@pytest.mark.parametrize("text", ["*", "*a b", "!x", "@x", "%x"])
def test_signs_of_yaml_at_the_beginning_of_a_value_are_refused_with_quotation_marks_as_the_way_out(text):
    with pytest.raises(ValueError, match=r"quotation marks|undefined alias"):
        parse_value(text)
