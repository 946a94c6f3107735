"""Compat: where a reply goes on that continues the last message, in any template.

templates.SMALL, and the real templates where LLAMA_CPP_TEMPLATES names their folder (see
templates.py). The other fields of the feature are in test_contract.py.
"""

import pytest

import engine
import templates
from features import reasoning, thinking, tools, turns, verbatim
from features.marks import shown

OWN_VARIABLES = {"fireworks-ai-llama-3-firefunction-v2"}  # wants `functions` and `datetime` of its caller
NAMES = [*templates.SMALL, *sorted(templates.REAL.keys() - OWN_VARIABLES)]
TAGS = {open: close for open, close in thinking.REASONING_TAGS.items() if close}
BEGUN = "Once upon a "


def load(model: engine.Model, source: str) -> templates.Loaded:
    model.set_template(source)
    return templates.Loaded(model, reasoning, tools, turns, verbatim)


def prompt_of(loaded: templates.Loaded, **last) -> str:
    """The prompt of a chat that goes on with its last message."""
    chat = templates.chat_of(loaded, {"continue_final_message": True, "messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", **last}]})
    return shown(chat, chat.render())


def is_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside the reasoning."""
    return any(prompt.rfind(open) > prompt.rfind(close) for open, close in TAGS.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_goes_on_where_the_content_ends(bare, name):
    """Never inside the reasoning, with the white space that was sent, from nothing, too."""
    loaded = load(bare, {**templates.SMALL, **templates.REAL}[name])
    for said in (BEGUN, "line\n\n", "", " \n x"):
        for thoughts in (None, "I think so."):
            if said or not thoughts:
                prompt = prompt_of(loaded, content=said, reasoning_content=thoughts)
                assert prompt.endswith(said) and not is_thinking(prompt), (said, prompt)
                assert "Hi" in prompt and len(prompt) > len(said) + 3


def test_the_prompt_is_that_of_the_whole_message_cut_off(bare):
    """As Hugging Face's apply_chat_template has it."""
    for name in ("takes everything", "writes reasoning", "no system, alternating"):
        loaded = load(bare, templates.SMALL[name])
        chat = templates.chat_of(loaded, {"add_generation_prompt": False, "messages": [
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One, two"}]})
        assert chat.render().startswith(prompt_of(loaded, content="One, two"))


def test_what_was_thought_stays_in_front_of_the_content(bare):
    """Where the template writes it, opens the reasoning and leaves it open, or opens it only for a
    reply."""
    closed = "<think>\nI see.\n</think>\n\n" + BEGUN
    for name in ("writes reasoning", "goes on inside the reasoning", "keeps the last system message"):
        loaded = load(bare, templates.SMALL[name])
        prompt = prompt_of(loaded, content=BEGUN, reasoning_content="I see.")
        assert prompt.endswith(closed) and prompt.count("<think>") == 1, prompt
    prompt = prompt_of(load(bare, templates.SMALL["goes on inside the reasoning"]), content=BEGUN)
    assert prompt.endswith("<think>\n\n</think>\n\n" + BEGUN)


def test_tags_in_the_content_are_parted_by_the_template(bare):
    """Also where the content begins with the thoughts, however the template finds them."""
    source = templates.SMALL["writes reasoning"]
    for source in (source, source.replace(".split('<think>')[-1]", ".replace('<think>', '')")):
        prompt = prompt_of(load(bare, source), content=f"<think>Hm.</think>{BEGUN}")
        assert prompt.endswith(f"<think>\nHm.\n</think>\n\n{BEGUN}")


def test_a_message_that_goes_on_may_follow_another_of_its_role(bare):
    """They are merged where the template wants that, and the reply goes on with the second."""
    for name in templates.SMALL:
        chat = templates.chat_of(load(bare, templates.SMALL[name]), {
            "continue_final_message": True, "messages": [
                {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well."},
                {"role": "assistant", "content": BEGUN}]})
        prompt = chat.render()
        assert prompt.endswith(BEGUN) and prompt.count("Well.") == 1 and not is_thinking(prompt)


def test_a_refusal_is_what_the_assistant_said(bare):
    """As a message or as a part of one; content beside it wins."""
    loaded = load(bare, templates.SMALL["takes everything"])
    for last in ({"refusal": "I won't."}, {"refusal": "I won't.", "content": None},
                 {"refusal": "I won't.", "content": ""}, {"refusal": None, "content": "I won't."},
                 {"content": "I won't.", "refusal": "No."},
                 {"content": [{"type": "refusal", "refusal": "I won't."}]}):
        assert prompt_of(loaded, **last).endswith("<|im_start|>assistant\nI won't.")
