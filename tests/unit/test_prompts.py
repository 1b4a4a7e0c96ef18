import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

import autointerp
from autointerp.errors import ConfigError
from autointerp.prompts import load_prompt, parse_prompt, prompt_path
from autointerp.scorers.parse import read_integers, read_list, read_number, read_numbers
from autointerp.scorers.simulation import read_lines

ROOT = Path(autointerp.__file__).parent.parent
NAMES = sorted(path.relative_to(ROOT / "prompts").with_suffix("").as_posix() for path in (ROOT / "prompts").rglob("*.toml"))
GOOD = {
    "description": "d",
    "answer": "label",
    "variables": ["explanation"],
    "system": "s",
    "user": "u {{explanation}}",
    "reminder": "r",
}


def parsed(**changes):
    return parse_prompt({**GOOD, **changes}, where="prompt 'x'")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"systm": "s"}, "prompt 'x' has an unknown key 'systm'; did you mean 'system'"),
        ({"user": "u {{explanation}} {{exampels}}"}, "uses the variable 'exampels', which `variables` does not declare"),
        ({"variables": ["explanation", "example"]}, "declares the variable 'example' and never uses it"),
        ({"answer": "lines"}, "answer = 'lines' cannot be used"),
        ({"answer": "marked_line"}, "a marker goes with 'marked_line'"),
        ({"marker": "X:"}, "a marker goes with 'marked_line'"),
        (
            {"turns": [{"user": "u", "assistant": "a", "asistant": ""}]},
            "worked example 1 has an unknown key 'asistant'; did you mean 'assistant'",
        ),
    ],
)
def test_bad_prompts_are_refused_with_a_sentence(changes, sentence):
    with pytest.raises(ConfigError) as caught:
        parsed(**changes)
    assert sentence in str(caught.value)


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="lacks the key 'system'"):
        parse_prompt({key: value for key, value in GOOD.items() if key != "system"}, where="prompt 'x'")
    with pytest.raises(ConfigError, match="has answer = 'label' and no reminder"):
        parse_prompt({key: value for key, value in GOOD.items() if key != "reminder"}, where="prompt 'x'")
    with pytest.raises(ConfigError, match="has answer = 'slots' and a reminder"):
        parse_prompt({**GOOD, "answer": "slots"}, where="prompt 'x'")


def test_substituted_text_is_never_expanded_again():
    prompt = parsed(variables=["a", "b"], user="{{a}} and {{ b }}")
    assert prompt.chat(a="{{b}} {{c}} {{", b=r"\1 {{a}}").messages[-1] == ("user", r"{{b}} {{c}} {{ and \1 {{a}}")


def test_the_marker_of_the_answer_is_broken_in_substituted_text_alone():
    prompt = parsed(answer="marked_line", marker="ANSWER:", user="write ANSWER: after {{explanation}}")
    text = "ANSWER: **ANSWER:** ANSWER**:** ANSWER :"
    assert prompt.chat(explanation=text).messages[-1] == (
        "user",
        "write ANSWER: after A NSWER: **A NSWER:** A NSWER**:** ANSWER :",
    )


def test_a_missing_value_is_refused():
    with pytest.raises(ConfigError, match="needs a value for the variable 'explanation'"):
        parsed().chat(explanatoin="x")


def test_system_and_turns_are_sent_as_they_stand():
    prompt = parsed(system="s {{explanation}}", turns=[{"user": "{{x}}", "assistant": "{{y}}"}])
    assert prompt.chat(explanation="E").messages == (
        ("system", "s {{explanation}}"),
        ("user", "{{x}}"),
        ("assistant", "{{y}}"),
        ("user", "u E"),
    )


def test_again_appends_the_reply_and_the_reminder():
    prompt = parsed(reminder="again, {{explanation}}")
    chat = prompt.chat(explanation="E")
    again = prompt.again(chat, "", explanation="E")
    assert again.messages == (*chat.messages, ("assistant", "(empty)"), ("user", "again, E"))


def test_prompt_id_is_of_what_is_sent():
    assert parsed().prompt_id == parsed(description="other").prompt_id
    assert parsed().prompt_id == parsed(user="\nu {{explanation}}\n").prompt_id
    for key in ("system", "reminder"):
        assert parsed().prompt_id != parsed(**{key: "changed"}).prompt_id


def test_require_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match="'list' is needed here"):
        parsed().require("list", frozenset({"explanation"}))
    with pytest.raises(ConfigError, match="unknown variable 'explanation'; did you mean 'explanations'"):
        parsed().require("label", frozenset({"explanations"}))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'score/detection'"):
        load_prompt("score/detecton")
    with pytest.raises(ConfigError, match="no such file"):
        load_prompt("/nowhere/x.toml")


def test_a_path_is_loaded(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('description="d"\nanswer="label"\nvariables=["example"]\nsystem="s"\nuser="{{example}}"\nreminder="r"\n')
    assert load_prompt(str(path)).chat(example="E").messages[-1] == ("user", "E")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_prompts_load_and_their_examples_have_the_form_they_ask_for(name):
    prompt = load_prompt(name)
    assert prompt_path(name) == ROOT / "prompts" / f"{name}.toml"
    assert len(prompt.file.turns) >= 3
    for turn in prompt.file.turns:
        answer, text, num = prompt.file.answer, turn.assistant, turn.user.count("\nText ") + turn.user.startswith("Text ")
        if answer == "marked_line":
            assert text.splitlines()[-1].startswith(prompt.file.marker)
        elif answer == "label":
            assert text in ("0", "1")
        elif answer == "slots":
            assert len(read_lines(text, name)) == 2
        elif answer == "levels":
            shown = orjson.loads(turn.user.split("): ", 1)[1])
            assert f"Tokens ({len(shown)})" in turn.user
            assert read_integers(text, len(shown), low=0, high=10)
        elif answer == "number":
            assert num == 5 and read_number(text, num)
        elif answer == "numbers":
            assert read_numbers(text, num) <= set(range(1, num + 1))
        elif answer == "list":
            assert num == 5 and len(read_list(text, num)) == 5
        else:
            assert answer == "none" and len(text.splitlines()) == 3


def test_worked_lists_are_one_mixed_one_all_0_one_all_1():
    for name in ("score/detection", "score/fuzzing"):
        answers = [orjson.loads(turn.assistant) for turn in load_prompt(name).file.turns]
        assert [sum(answer) for answer in answers] == [2, 0, 5]


def test_without_a_checkout_the_packaged_prompts_are_used(tmp_path):
    package = tmp_path / "site-packages" / "autointerp"
    package.mkdir(parents=True)
    for name in ("__init__", "prompts", "config", "digest", "errors", "records"):
        shutil.copy(ROOT / "autointerp" / f"{name}.py", package)
    shutil.copytree(ROOT / "prompts", package / "_prompts")
    # A folder of that name beside the package is not a checkout's.
    (tmp_path / "site-packages" / "prompts" / "score").mkdir(parents=True)
    code = "from autointerp.prompts import prompt_path; print(prompt_path('score/detection'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site-packages", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(package / "_prompts" / "score" / "detection.toml")
