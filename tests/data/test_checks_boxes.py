"""What validation says of boxes that nobody can have meant so: shares read as pixels, no picture, crops not shown."""

from __future__ import annotations

import pytest

from tests.data.test_checks import box_of, kinds, talk


def test_a_remark_is_no_fault(check):
    more = [{"from": "human", "value": "And?"}]
    rows = [{"conversations": [*talk("Hi", answer)["conversations"], *more]} for answer in ("a", "b")]
    rows += [talk(answer=f"[{{'bbox_2d': [1, 2, {n}, 40]}}]", image="good.png") for n in (30, 31)]
    rows += [talk(answer="<box>(0.1,0.2),(1.000,0.4)</box>", image="good.png")]
    check(*rows)
    text = check.report.text()
    assert check.report.clean, text
    assert "remark (2): data-0, line 1: the last question has no answer" in text
    assert (
        "remark (2): data-2, line 3: no box is read in an answer that holds what looks like one: [1, 2, 30, 40]: write it as"
        in text
    )
    assert "remark (1): data-4, line 5: a coordinate of exactly 1 is read as the far edge" in text


@pytest.mark.parametrize(
    "entry, said",
    [
        (talk(answer=box_of(0.1, 0.1, 0.5, 0.5), image="good.png", box_coordinates="thousand"), "`box_coordinates`"),
        (talk(answer="<tool_call>Crop [0.1,0.1,0.5,0.5]</tool_call><image>", image="good.png"), "`call_coordinates`"),
        (talk(image={"path": "good.png", "box": [0.1, 0.1, 0.5, 0.5]}), "`coordinates`"),
        (
            {"image_path": "good.png", "QnA": [{"Q": "?", "A3": "{Crop dog [0.1, 0.1, 0.5, 0.5]}"}]},
            "`call_coordinates`",
        ),
    ],
)
def test_shares_are_no_pixels(check, entry, said):
    assert kinds(check(entry)) == ["unreadable_box"], check.report.text()
    [fault] = check.report
    assert "which are shares of a picture (normalised) rather than" in fault.message
    assert f'say so ({said}: "normalised") or correct it' in fault.message
    assert ("in an annotation line write pixels" in fault.message) == (said == "`call_coordinates`")


def test_the_hint_names_what_is_likely_first(check):
    for numbers, hint in [
        ((10, 10, 70, 50), '"pixels" or "thousand"'),
        ((221, 423, 569, 886), '"thousand" or "pixels"'),
    ]:
        check(talk(answer=box_of(*numbers), image="good.png"))
        assert f"say so: `box_coordinates`: {hint}" in next(iter(check.report)).message


def test_a_box_without_a_picture(check):
    assert kinds(check(talk("Hi", box_of(0.1, 0.1, 0.5, 0.5)))) == ["box_outside"]
    assert kinds(check(talk("Hi", "<tool_call>Crop [10,10,50,50]</tool_call>"))) == ["box_outside"]
    assert kinds(check(talk(f"Where is {box_of(0.1, 0.1, 0.5, 0.5)}?", box_of(0.1, 0.1, 0.5, 0.5)))) == []


def test_a_crop_that_is_not_shown(check):
    call = "<tool_call>Crop [10,10,50,50]</tool_call>"
    for answer, expected in [
        (f"{call}<image> So {call} it is.", ["placeholder_count"]),
        (f"{call}<image> So {call}", []),  # what a model writes before the tool runs
        (f"{call} So {call}", []),  # a set without crops
        (f"{call} {call}<image><image> So {call} <tool_response>no</tool_response> it is.", []),
    ]:
        assert kinds(check(talk(answer=answer, image="good.png"))) == expected, answer
