"""Forms: tool calls as the model writes them, learned from its chat template; its reasoning, too.

The small templates of small_templates.py always run; with LLAMA_CPP_TEMPLATES the published ones do, too.

    1  learning      what is learned, and what it costs
    2  round trips   what the grammar lets through is what was meant
    3  forced calls  by the default model: exactly the template's text
    4  reasoning     learned tags, no reasoning, a budget
    5  the server    what clients see
"""

import json
import re
import sys
import time
import types
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import conftest  # noqa: E402
import engine  # noqa: E402
import server  # noqa: E402
from features import (  # noqa: E402
    calls, forms, grammars, reasoning, renderings, structured, tools, turns, verbatim)
from features.calls import ID, KEY, NAME, NUMBER  # noqa: E402
from small_templates import (  # noqa: E402
    FORMS, NAMES, PUBLISHED, TEMPLATES, learned, model_of, template, thinking_of)

# Of the published templates: those that write no calls, whatever they are told, ...
WRITE_NONE = {"HuggingFaceTB-SmolLM3-3B", "LFM2-8B-A1B", "LFM2.5-Instruct", "google-gemma-2-2b-it",
              "ibm-granite-granite-3.3-2B-Instruct", "llama-cpp-rwkv-world",
              "microsoft-Phi-3.5-mini-instruct"}
# ... and those that Hugging Face's sandbox, which is ours, does not let write any.
REFUSED = {"Kimi-K2-Instruct", "Kimi-K2-Thinking",  # they append to a list
           "llama-cpp-deepseek-r1"}  # it writes a generator as JSON
UNLIKE = {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B"}  # it closes two calls, and forgets to close one
ASKED = "What is the weather in Paris?"
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather in a city.", "parameters": {
        "type": "object", "required": ["city", "days"], "properties": {
            "city": {"type": "string", "description": "A city", "enum": ["Paris", "New York"]},
            "days": {"type": "integer", "description": "Days", "minimum": 0, "maximum": 9}}}}}


@pytest.fixture(scope="module")
def loaded():
    """The default model in an engine of this process, for templates of one's own."""
    model = engine.Model(conftest.default_model())
    running = engine.Engine(model, engine.Context(model, 2048, 1)).start()
    yield running
    running.close()
    model.close()


def chat_of(loaded: engine.Engine, source: str, **body) -> server.Chat:
    """A chat with a template, after features have had their say."""
    loaded.model.set_template(source)
    loaded.capabilities.clear()
    house, config = conftest.house(), conftest.config()
    for feature in (reasoning, tools, turns, verbatim):
        feature.equip(loaded, config)
    sent = {**{name: getattr(config, name) for name in server.DEFAULTED}, "max_tokens": 400,
            "messages": [{"role": "user", "content": ASKED}], "temperature": 0, **body}
    handler = types.SimpleNamespace(
        loaded=loaded, server=types.SimpleNamespace(config=config, house=house),
        tokenize=lambda text, param, n_reply=1, read=None: (read or loaded.model.tokenize)(text))
    chat = house.type_of(server.Chat)(handler, server.read_object(
        house.type_of(server.ChatBody), sent, "", server.Reading(house)))
    for join in house.having("join"):
        join(chat)
    return chat


def reply_to(chat: server.Chat) -> tuple[str, dict, str]:
    """The text of a reply, its message and its finish_reason."""
    chat.make_choices()
    chat.loaded.submit(chat.choices)
    text, message, (parser,) = "", {}, chat.parsers
    while True:
        event = chat.choices[0].events.get(timeout=120)
        if event.error:
            raise event.error
        text += event.text
        for delta in parser.feed(event.text) + (parser.finish() if event.finish_reason else []):
            server.merge(message, delta)
        if event.finish_reason:
            message |= {"tool_calls": calls.joined(message["tool_calls"])} if "tool_calls" in message else {}
            return text, message, parser.finish_reason(event.finish_reason)


# ==== 1. Learning =========================================================================


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_of_every_small_template_is_learned(name):
    """Names in JSON, as its keys, in tags; arguments as JSON or one by one; with ids, numbers, types;
    one call or several."""
    form, why = learned(TEMPLATES[name])
    assert form.takes_calls and form.takes_tools and why == "learned from the chat template"
    assert bool(form.separator) == (name != "llama3")
    assert form.short_ids == (name == "mistral")
    assert form.takes_text == (not form.takes_content) == (name == "text")
    assert form.at_start == (name in ("llama3", "recipient"))


def test_what_is_learned_is_what_stands_between_the_words():
    form = FORMS["qwen3-coder"]
    assert (form.opening, form.trigger) == ("<tool_call>\n<function=", "<tool_call>")
    assert (form.between, form.ending) == (">\n", "</function>\n</tool_call>")
    assert form.separator == "\n<tool_call>\n<function=" and form.closing == ""
    assert form.elements.joint == form.elements.first == "<parameter="
    assert form.elements.styles["string"] == calls.Style(">\n", "\n</parameter>\n")
    numbered = FORMS["numbered"]
    assert numbered.between == f'" index="{NUMBER}"<|sep|>' and numbered.first_number == 1
    assert FORMS["mistral"].between == f"[CALL_ID]{ID}[ARGS]"
    assert NAME in FORMS["recipient"].between and FORMS["gemma"].elements.is_sorted


@pytest.mark.parametrize("source, why", [
    (template("").replace("{% if m.tool_calls %}", "{% if false %}"), forms.NO_CALLS),
    ("{% if tools %}{{ raise_exception('no') }}{% endif %}" + TEMPLATES["hermes"], forms.NO_TOOLS),
    (template("{{ f.name }} {{ f.arguments | length }} <end>", "<calls>"), forms.UNKNOWN),
    # What stands behind the name ends with what a name may go on with.
    (template("<call>{{ f.name }}_x {{ f.arguments | tojson }}</call>"), forms.MISREAD),
    ("{{ messages[0].content }}", forms.NO_TOOLS),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
     + TEMPLATES["hermes"], forms.TOO_SLOW)])
def test_a_template_that_cannot_be_learned_has_the_generic_form_and_says_why(source, why, monkeypatch):
    monkeypatch.setattr(engine, "MAX_TEMPLATE_SECONDS", 0.5)
    monkeypatch.setattr(renderings, "MAX_SECONDS", 0.1)  # of the processor
    assert learned(source) == (calls.GENERIC, why)


def test_a_form_that_fails_its_own_test_is_told_in_the_log(loaded, caplog):
    chat_of(loaded, template("<call>{{ f.name }}_x {{ f.arguments | tojson }}</call>"))
    assert caplog.text.count("tool calls have the generic form: what the chat template") == 1
    assert loaded.facts["tool_calls"] == "generic"
    caplog.clear()
    chat_of(loaded, TEMPLATES["hermes"])
    assert not caplog.text and loaded.facts["tool_calls"] == "native"


def test_learning_costs_less_than_a_tenth_of_a_second():
    """It stands between a model and its first request; the largest of the published ones takes 0.1 s."""
    model, took = model_of(TEMPLATES["numbered"]), []
    for _ in range(3):
        began = time.perf_counter()
        forms.learn(model, reasoning.learn(model))
        took.append(time.perf_counter() - began)
    assert min(took) < 0.1


def test_nearly_every_published_template_that_writes_calls_is_learned():
    whys = {name: learned((PUBLISHED / f"{name}.jinja").read_text())[1] for name in NAMES}
    assert {name for name, why in whys.items() if why != "learned from the chat template"} \
        == (WRITE_NONE | REFUSED) & set(NAMES)


# ==== 2. Round trips ======================================================================

TEXTS = st.text(st.sampled_from("aB 9_.,:/é漢🦙\n\t\"'\\<>{}[]()|=&#%"), max_size=12)
VALUES = {
    "string": TEXTS, "integer": st.integers(-10**6, 10**6), "boolean": st.booleans(),
    "number": st.integers(-99, 99).map(lambda n: n / 4), "null": st.none(),
    "array": st.lists(st.integers(0, 9) | TEXTS, max_size=3),
    "object": st.dictionaries(TEXTS, st.none() | TEXTS | st.lists(TEXTS, max_size=2), max_size=2)}


@st.composite
def functions_and_arguments(draw):
    """The parameters of a function, and arguments that they allow."""
    kinds = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=5))
    properties = {f"{kind[:2]}{i}": {"type": kind} for i, kind in enumerate(kinds)}
    given = {key: draw(VALUES[schema["type"]]) for key, schema in properties.items()}
    left_out = draw(st.sets(st.sampled_from(sorted(given)))) if given else set()
    return ({"type": "object", "properties": properties,
             "required": [key for key in given if key not in left_out]},
            {key: value for key, value in given.items() if key not in left_out})


def written(form: calls.CallForm, name: str, arguments: dict) -> str:
    """A call as its form has it."""
    def value(key, kind, given):
        style = form.elements.styles[kind]
        text = json.dumps(given, ensure_ascii=False)
        if kind == "string":
            quote = style.after[0]
            text = grammars.escaped(given, quote) if form.elements.escapes else given
        elif form.elements.python_words and (given is None or isinstance(given, bool)):
            text = str(given)
        return f"{key}{style.middle}{text}{style.after}".replace(KEY, key)

    if form.elements is None:
        text = json.dumps(arguments, ensure_ascii=False)
    else:
        keys = sorted(arguments, key=str.lower) if form.elements.is_sorted else arguments
        kinds = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null",
                 dict: "object", list: "array"}
        each = [value(key, kinds[type(arguments[key])], arguments[key]) for key in keys]
        text = form.elements.first * bool(each) + form.elements.joint.join(each)
    text = form.opening + name + form.between + text + form.ending + form.closing
    return text.replace(NAME, name).replace(ID, "abcdefgh1").replace(NUMBER, str(form.first_number))


def read(form: calls.CallForm, offered: list[dict], text: str, step: int) -> list[tuple[str, str]]:
    """Names and arguments of the calls in a text that comes in pieces."""
    parser, message = calls.CallParser(form, offered), {}
    for i in range(0, len(text), step):
        for delta in parser.feed(text[i:i + step]):
            server.merge(message, delta)
    for delta in parser.finish():
        server.merge(message, delta)
    assert parser.n_whole == parser.n_calls
    return [(call["function"]["name"], call["function"]["arguments"])
            for call in calls.joined(message.get("tool_calls", []))]


@pytest.mark.parametrize("name", TEMPLATES)
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True,
                     suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(made=functions_and_arguments(), step=st.integers(1, 9))
def test_arguments_survive_the_round_trip_in_every_form(loaded, name, made, step):
    """Nested objects, arrays, unicode, newlines, quotes, none at all: what a call of the form says is
    what is read out of it, the grammar lets it come, and the template writes it so, too."""
    parameters, arguments = made
    form = FORMS[name]
    texts = [value for value in arguments.values() if isinstance(value, str)]
    if form.elements and not form.elements.escapes:  # a marker inside of bare text ends it
        hypothesis.assume(not any(form.elements.styles["string"].after in text for text in texts))
    offered = [{"type": "function", "function": {"name": "do_it", "parameters": parameters}}]
    text = written(form, "do_it", arguments)
    ((called, given),) = read(form, offered, text, step)
    assert called == "do_it" and json.loads(given) == arguments
    reply = structured.Form()
    rules = grammars.add_arguments(reply, form, parameters, "parameters")
    reply.root = grammars.calls_of(form, [("do_it", rules)], False, False)
    constraint = reply.replies(loaded.model, must_trigger=True)()
    tokens = loaded.model.tokenize(text, bos=False, special=False).tolist()
    assert all(constraint.take(token) for token in tokens), text
    assert constraint.take(min(loaded.model.end_tokens))
    nests = form.elements is None or form.elements.nests or not any(
        isinstance(value, (dict, list)) for value in arguments.values())
    if nests and not (form.elements and form.elements.escapes):  # that template escapes nothing
        turn = {"role": "assistant", "content": "" if form.takes_content else None, "tool_calls": [
            {"id": "abcdefgh1", "type": "function", "function": {
                "name": "do_it", "arguments": tools.read_arguments(json.dumps(arguments), form)}}]}
        assert text in model_of(TEMPLATES[name]).render_chat(
            [{"role": "user", "content": ASKED}, turn], False)


def test_a_bounded_string_is_bare_text_too(loaded):
    """maxLength counts its characters, and the text around it is none of them."""
    form, reply = FORMS["qwen3-coder"], structured.Form()
    parameters = {"properties": {"a": {"type": "string", "minLength": 2, "maxLength": 4}}}
    reply.root = grammars.calls_of(
        form, [("f", grammars.add_arguments(reply, form, parameters, "p"))], False, False)
    new = reply.replies(loaded.model, must_trigger=True)
    for text, may in [("ab", True), ("a\nd", True), ("<<<<", True), ("a", False), ("abcde", False)]:
        constraint, call = new(), written(form, "f", {"a": text})
        tokens = [*loaded.model.tokenize(call, bos=False).tolist(), min(loaded.model.end_tokens)]
        assert all(constraint.take(token) for token in tokens) == may, text


# ==== 3. Forced calls =====================================================================


def check_forced_call(loaded: engine.Engine, source: str) -> None:
    """A call that must come, by a model that knows nothing of the template, is the text that jinja2
    alone makes of that call."""
    chat = chat_of(loaded, source, tools=[WEATHER], tool_choice="required",
                   reasoning_effort="none", parallel_tool_calls=False)
    assert loaded.facts["tool_calls"] == "native"
    text, message, reason = reply_to(chat)
    assert reason == "tool_calls" and not message.get("content"), text
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["city"] in ("Paris", "New York") and 0 <= arguments["days"] <= 9
    form, model = learned(source)[0], loaded.model
    call_id = re.search('"id": "(.{9})"', text)  # it comes too late to be sent with the name
    turn = {"role": "assistant", "content": "" if form.takes_content else None, "tool_calls": [
        {"id": call_id[1] if call_id else call["id"], "type": "function", "function": {
            "name": "get_weather",
            "arguments": json.dumps(arguments) if form.takes_text else arguments}}]}
    alone = Jinja2ChatFormatter(source, model._template.eos_token, model._template.bos_token,
                                add_generation_prompt=False)
    assert text in alone(messages=[{"role": "user", "content": ASKED}, turn],
                         **{"tools": [WEATHER], **tools.variables_of([WEATHER], form)}).prompt


N_ALWAYS = 8  # of the small templates; a reply of each takes seconds


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if number >= N_ALWAYS else [])
    for number, name in enumerate(TEMPLATES)])
def test_a_forced_call_is_the_small_templates_own_text(loaded, name):
    check_forced_call(loaded, TEMPLATES[name])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in
                                  WRITE_NONE | REFUSED | UNLIKE])
def test_a_forced_call_is_the_published_templates_own_text(loaded, name):
    check_forced_call(loaded, (PUBLISHED / f"{name}.jinja").read_text())


@pytest.mark.parametrize("name", ["hermes", "llama3", "numbered", "recipient"])
def test_where_calls_are_free_the_model_may_answer_too(loaded, name):
    chat = chat_of(loaded, TEMPLATES[name], tools=[WEATHER], max_tokens=40)
    text, message, _ = reply_to(chat)
    assert message.get("content") or message.get("tool_calls"), text
    assert "to=user" not in message.get("content", "")


# ==== 4. Reasoning ========================================================================


@pytest.mark.parametrize("prompt, opening, closing", [
    ("<|assistant|>", "<think>\n", "\n</think>\n\n"), ("<|assistant|>", "<thought>", "</thought>"),
    ("<|assistant|>", " to=self<|message|>", "<|eom|><|assistant|>"),
    ("<|assistant|>Thinking:\n", "Thinking:\n", "\n[BEGIN FINAL RESPONSE]\n")])
def test_the_tags_of_reasoning_are_learned(prompt, opening, closing):
    opens = "" if opening.startswith("Thinking") else opening  # only the prompt has it
    source = template("", prompt=prompt, content="{% if m.reasoning_content %}" + opens
                      + "{{ m.reasoning_content }}" + closing + "{% endif %}{{ m.content }}")
    thinking = thinking_of(source)
    assert (thinking.opening, thinking.closing) == (opening, closing)
    text = f"{opening}Hm.{closing}Yes."
    parser = reasoning.ReplyParser("", True, thinking)
    assert parser.feed(text) + parser.finish() == [{"reasoning_content": "Hm."}, {"content": "Yes."}]


LEFT_OPEN = TEMPLATES["thinking"]
OPTION = template("", prompt="<|assistant|>{% if enable_thinking is false %}<think>\n\n</think>\n\n"
                  "{% endif %}", content="{% if m.reasoning_content %}<think>\n"
                  "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}")
UNTOLD = OPTION.replace("enable_thinking is false", "false")
PICKY = LEFT_OPEN.replace("{% if add", "{% if reasoning_effort == 'none' %}"
                          "{{ raise_exception('unknown effort') }}{% endif %}{% if add")


@pytest.mark.parametrize("source", [LEFT_OPEN, OPTION, UNTOLD, PICKY],
                         ids=["left open", "an option", "no option", "picky"])
def test_no_reasoning_is_closed_reasoning(loaded, source):
    """Whatever the template does with the options: it leaves the tag open, closes it, does not care,
    or refuses the word."""
    for said in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        prompt = chat_of(loaded, source, **said).render()
        assert prompt.endswith("<|assistant|><think>\n\n</think>\n\n")
    assert "</think>" not in chat_of(loaded, source, reasoning_effort="high").render()


@pytest.mark.parametrize("budget", [0, 3])
def test_a_budget_closes_the_reasoning_when_it_is_spent(loaded, budget):
    """A model that would think on calls all the same, by writing the close tag."""
    chat = chat_of(loaded, LEFT_OPEN, reasoning_budget=budget, tools=[WEATHER],
                   tool_choice="required", parallel_tool_calls=False)
    text, message, reason = reply_to(chat)
    thought = message.get("reasoning_content", "")
    assert text.count("\n</think>\n\n") == 1 and reason == "tool_calls"
    assert len(loaded.model.tokenize(thought, bos=False)) <= budget
    (call,) = message["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "New York")


def test_a_budget_holds_where_the_reply_opens_the_reasoning_and_with_other_forms(loaded):
    chat = chat_of(loaded, LEFT_OPEN, reasoning_budget=4, response_format={"type": "json_schema",
                   "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}})
    text, message, _ = reply_to(chat)
    assert json.loads(message["content"]) in ("yes", "no") and message["reasoning_content"]
    thinking, model = thinking_of(UNTOLD), loaded.model
    budget = reasoning.Budget(model, thinking, 2, "", None)
    tokens = model.tokenize("<think>\nA long, long thought", bos=False).tolist()
    opened = len(model.tokenize("<think>", bos=False))
    taken = [budget.take(token) for token in tokens]
    assert all(taken[:opened]) and not all(taken[: opened + 4])
    for token in model.tokenize(thinking.closing, bos=False).tolist():
        assert budget.take(token)
    assert all(budget.take(token) for token in tokens)  # free again
    answers = reasoning.Budget(model, thinking, 0, "", None)
    assert all(answers.take(token) for token in model.tokenize("Yes <think>", bos=False).tolist())


def test_the_budget_waits_for_the_end_of_a_character(loaded):
    """A tag in the middle of one would break both."""
    budget, model = reasoning.Budget(loaded.model, reasoning.Thinking(), 1, "</think>", None), \
        loaded.model
    first, *rest = model.tokenize("🦙", bos=False).tolist()
    assert len(rest) >= 1 and budget.take(first) and all(budget.take(token) for token in rest)
    assert not budget.take(first)


# ==== 5. The server =======================================================================


@pytest.fixture(scope="module")
def native(start_server, tmp_path_factory):
    """A server with a template whose form of calls is learned."""
    file = tmp_path_factory.mktemp("templates") / "qwen3-coder.jinja"
    file.write_text(TEMPLATES["qwen3-coder"])
    return start_server(CHAT_TEMPLATE_FILE=str(file), PARALLEL="1")


def post(http, **body) -> dict:
    reply = http.post("/v1/chat/completions", json={
        "messages": [{"role": "user", "content": ASKED}], "temperature": 0, "max_tokens": 300, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def test_the_list_of_models_says_which_form_calls_have_and_why(http, native):
    meta = http.get("/v1/models").json()["data"][0]["meta"]
    assert (meta["tool_calls"], meta["tool_calls_why"]) == ("generic", forms.NO_CALLS)
    meta = native.get("/v1/models").json()["data"][0]["meta"]
    assert (meta["tool_calls"], meta["tool_calls_why"]) == (
        "native", "learned from the chat template")


def test_a_call_that_must_come_in_a_generic_form_comes_once(http):
    """The little model repeats itself until max_tokens; who wants several says so."""
    choice = post(http, tools=[WEATHER], tool_choice="required")
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"


@pytest.mark.slow
def test_a_learned_form_streams_as_it_answers(native):
    asked = {"tools": [WEATHER], "tool_choice": {"type": "function",
                                                 "function": {"name": "get_weather"}}}
    whole = post(native, **asked)["message"]["tool_calls"]
    lines = native.post("/v1/chat/completions", json={
        "messages": [{"role": "user", "content": ASKED}], "temperature": 0, "max_tokens": 300,
        "stream": True, **asked}).text.split("\n\n")
    delta: dict = {}
    for line in lines:
        if line.startswith("data: {"):
            server.merge(delta, json.loads(line.removeprefix("data: "))["choices"][0]["delta"])
    assert [call["function"] for call in calls.joined(delta["tool_calls"])] == [
        call["function"] for call in whole]


@pytest.mark.parametrize("arguments", ['{"city": "Par', "[1, 2]", "", "not JSON", '"text"', "null"])
def test_a_history_is_not_refused_for_its_arguments(native, arguments):
    """A call that was cut off, or is no object, reaches the template as an object that shows it."""
    call = {"id": "call_1", "type": "function",
            "function": {"name": "get_weather", "arguments": arguments}}
    messages = [{"role": "user", "content": ASKED},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "Bad arguments."}]
    prompt = native.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert "<function=get_weather>" in prompt and arguments in prompt


def test_a_template_of_one_call_gets_each_in_a_message_of_its_own():
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": "Wait.", "tool_calls": [
        {**call, "id": "a"}, {**call, "id": "b"}]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"}]
    turns = tools.prepare_messages(messages, [], FORMS["llama3"])
    assert [turn["role"] for turn in turns] == ["assistant", "tool"] * 2
    assert [turn.get("content") for turn in turns] == ["Wait.", "1", None, "2"]
    assert tools.prepare_messages(messages, [], FORMS["hermes"])[0]["tool_calls"][1]["id"] == "b"


def test_names_and_bounds_that_elements_cannot_have(loaded):
    """A name that has in it what ends names is a 400; JSON's 4.0 is an integer."""
    form = FORMS["glm"]
    with pytest.raises(structured.SchemaError, match="ends names"):
        grammars.add_arguments(structured.Form(), form, {
            "properties": {f"a{form.elements.middle}b": {"type": "string"}}}, "parameters")
    reply = structured.Form()
    reply.root = grammars.add_arguments(reply, form, {
        "properties": {"a": {"type": "string", "minLength": 2.0, "maxLength": 4.0}}}, "parameters")
    assert "{2,4}" in reply._lark()
