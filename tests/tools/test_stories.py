"""Laws of the training text of the embedded model (tools/tiny/stories)."""

import json
import random
import re
from pathlib import Path

import pytest

from tools.tiny import judge
from tools.tiny.stories import chat, check, documents, plots, skills, tell, words

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "refengine/models/tiny"


@pytest.fixture(scope="module")
def told():
    """Return six stories of every plot."""
    rng = random.Random(0)
    return [tell(rng, name) for name in plots() for _ in range(6)]


def test_the_world_is_as_wide_as_promised(told):
    kinds = {w for s in told for w in re.findall(r"[a-z]+", s.text.lower())}
    assert len(plots()) >= 30
    assert len(kinds) >= 1500


def test_every_story_is_read_back_as_it_was_meant(told):
    for story in told:
        report = check(story.text)
        assert report.coherent, report.why
        assert report.plot == story.plot
        assert all(story.values[k] == v for k, v in report.values.items())


def test_the_same_seed_tells_the_same_story():
    one, two = (random.Random(5) for _ in range(2))
    assert [tell(one).text for _ in range(5)] == [tell(two).text for _ in range(5)]


def _swap(text, old, new, which=-1):
    """Replace one occurrence of a word (the last one by default)."""
    at = [m.span() for m in re.finditer(rf"\b{old}\b", text)][which]
    return text[: at[0]] + new + text[at[1] :]


def test_a_changed_name_is_caught(told):
    for story in told[::7]:
        stranger = next(n for n in words.NAMES if n not in story.values.values())
        assert not check(_swap(story.text, story.values["H"], stranger)).consistent


def test_a_changed_object_is_caught(told):
    for story in told:
        if "T" in story.values and len(re.findall(rf"\b{story.values['T']}\b", story.text)) > 1:
            other = next(t for t in plots()[story.plot].slots["T"] if t not in story.values.values())
            assert not check(_swap(story.text, story.values["T"], other)).consistent


def test_a_pronoun_of_the_wrong_sex_is_caught():
    text = tell(random.Random(1), "star_wish", {"H": "Mia", "G": "mother"}).text
    boy = re.sub(r"\bMia\b", "Tom", text)
    assert check(text).consistent and not check(boy).consistent


def test_a_sentence_of_another_world_is_caught():
    text = tell(random.Random(2)).text
    assert not check(text.replace("\n\n", " The stock market fell. ", 1)).parsed
    assert not check("").consistent
    assert not check(text.rsplit("\n\n", 1)[0]).consistent  # it has no ending


def test_articles_fit_their_words(told):
    for story in told:
        assert not re.search(r"\b[Aa] [aeio]\w+|\ban [^aeiouh]", story.text), story.text


def test_fixed_values_are_used_and_excluded_ones_are_not():
    rng = random.Random(3)
    for _ in range(30):
        story = tell(rng, fixed={"T": "drum"}, exclude={"Mia", "Tom", "park"})
        assert " drum" in story.text
        assert not {"Mia", "Tom", "park"} & set(story.values.values())


def test_facts_bind_no_name_twice_and_fillers_keep_away():
    rng = random.Random(4)
    for _ in range(30):
        text = "".join(t for t, _ in skills.recall(rng, 6, 1))
        bound = re.findall(r"(\w+) has the (\w+)\.", text)
        assert len(set(bound)) == len({n for n, _ in bound}) == 6
        filler = text.split("\n\n", 1)[1].split("\nQuestion")[0]
        assert not {name for name, _ in bound} & set(re.findall(r"\w+", filler))


def test_answers_of_the_skills_are_right():
    rng = random.Random(5)
    for _ in range(50):
        text = "".join(t for t, _ in skills.sums(rng))
        for a, b, c, d, e in re.findall(r"is (\d) \+ (\d)\?\nAnswer: (\d) \+ (\d) = (\d+)\.", text):
            assert (a, b) == (c, d) and int(a) + int(b) == int(e)
        text = "".join(t for t, _ in skills.copying(rng))
        said, copied = re.fullmatch(r"Copy:(.*)\nAnswer:(.*)", text).groups()
        assert said == copied
        text = "".join(t for t, _ in skills.counting(rng))
        rounds = re.findall(r"Count:(.*)\nAnswer: (\w+)\.", text)
        assert rounds and text == "\n".join(f"Count:{items}\nAnswer: {number}." for items, number in rounds)
        assert all(words.NUMBERS.index(number) == len(items.split()) for items, number in rounds)
        text = "".join(t for t, _ in skills.running_count(rng))
        for line in text.splitlines():
            found = re.fullmatch(r"Count along:((?: \w+ \w+)+)\.", line)[1].split()
            assert len(set(found[0::2])) == 1 and found[1::2] == words.NUMBERS[1 : len(found) // 2 + 1]


def test_questions_about_a_story_are_answered_from_its_cast(told):
    for story in told:
        for question, answer in story.questions:
            assert question.endswith("?") and answer.endswith(".")
            names = set(re.findall(r"\w+", question + answer)) & set(words.NAMES)
            assert names <= {story.values["H"], story.values.get("F")}


def test_chats_are_rendered_by_the_packaged_template():
    """An independent Jinja environment renders the training text from the shipped file."""
    jinja = pytest.importorskip("jinja2.sandbox")
    environment = jinja.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((SHIPPED / "chat_template.jinja").read_text())
    rng = random.Random(6)
    for _ in range(80):
        made, thinking = chat.talk(rng), rng.random() < 0.5
        text = template.render(messages=made.with_thoughts() if thinking else made.messages, tools=made.tools)
        assert text == "".join(t for t, _ in made.render(thinking)) + "\n"


def test_only_replies_are_worth_learning():
    rng = random.Random(8)
    for kind in chat.SCENES:
        made = chat.scene(rng, kind)
        pieces = made.render(True)
        learned = "".join(t for t, w in pieces if w > 0)
        assert made.answer in learned and made.replies[-1][0] in learned
        assert not [m for m in made.messages if m["role"] == "user" and f"user\n{m['content']}" in learned]
        assert sum(t == "<|im_end|>" and w == 1.0 for t, w in pieces) == len(made.replies)


def test_in_practice_a_token_of_a_reply_counts_in_full_and_nothing_else_counts():
    rng = random.Random(8)
    for _ in range(40):
        pieces = chat.practice(rng)
        replies = "".join(text for text, weight in pieces if weight)
        assert {weight for _, weight in pieces} - {0.0} and all(w == 0 or w >= 1 for _, w in pieces)
        assert replies.count("<|im_end|>") == "".join(t for t, _ in pieces).count("<|im_start|>assistant")
        assert "user" not in {text.strip() for text, weight in pieces if weight}


def test_no_answer_begins_with_a_name():
    rng = random.Random(9)
    for _ in range(400):
        for message in chat.talk(rng).messages:
            if message["role"] == "assistant" and message["content"] and "\n" not in message["content"]:
                assert re.match(r"\w+", message["content"])[0] not in words.NAMES, message["content"]


def test_a_requested_story_has_the_name_and_the_thing():
    rng = random.Random(9)
    wished = set()
    for _ in range(150):
        made = chat.scene(rng, "story_about_both")
        name, thing = re.search(r"(\w+) and an? (\w+)\.?$", made.messages[0]["content"]).groups()
        assert judge.requested(made.answer, name, thing)
        wished.add(thing)
    assert len(wished) > 40  # users can request nearly every thing


def test_the_example_of_the_documentation_is_in_the_training_text():
    """The generator can make the request that the documentation shows."""
    rng = random.Random(10)
    seen = {chat.scene(rng, "story_about_both").messages[0]["content"] for _ in range(20_000 // 40)}
    assert any(re.fullmatch(r"Tell me a story about a girl named \w+ and a \w+\.", wish) for wish in seen)
    assert "Mia" in words.GIRLS and "kite" in words.THINGS


def test_an_accepted_offer_brings_a_story_and_a_declined_one_does_not():
    rng = random.Random(14)
    told = []
    for _ in range(30):
        made = chat.scene(rng, "accept")
        assert made.messages[1]["content"] == chat.GREETED
        told.append(check(made.answer).parsed)
        assert told[-1] or made.answer == chat.DECLINED
    assert 10 < sum(told) < 30


def test_replies_of_chats_are_right():
    rng = random.Random(11)
    for _ in range(60):
        for kind in ("sums", "tool_add_used"):
            a, b, c = map(
                int, re.fullmatch(r"(\d+) \+ (\d+) = (\d+)\.", chat.scene(rng, kind).answer).groups()
            )
            assert a + b == c
        made = chat.scene(rng, "counting")
        items = made.messages[-2]["content"].split("?")[1].split()
        assert made.answer == f"I count {words.NUMBERS[len(items)]}."
        made = chat.scene(rng, "recall")
        told = " ".join(m["content"] for m in made.messages if m["role"] == "user")
        facts = dict(re.findall(r"(\w+) has the (\w+)\.", told))
        name, thing = (
            re.fullmatch(r"You told me that (\w+) has the (\w+)\.", made.answer)
            or re.fullmatch(r"You told me that the (?P<t>\w+) is with (?P<n>\w+)\.", made.answer)
        ).groups()
        assert facts.get(name, facts.get(thing)) in (name, thing)


def test_tools_are_called_with_what_was_asked_and_their_result_is_used():
    rng = random.Random(12)
    for _ in range(40):
        made = chat.scene(rng, "tool_add")
        (call,) = made.calls
        assert [int(n) for n in re.findall(r"\d+", made.messages[0]["content"])] == list(
            call["arguments"].values()
        )
        assert call["name"] in {tool["function"]["name"] for tool in made.tools}
        made = chat.scene(rng, "tool_weather_used")
        sky, city = re.fullmatch(r"It is (\w+) in (\w+)\.", made.answer).groups()
        assert sky in made.messages[-2]["content"] and city in made.messages[0]["content"]


def test_held_out_forms_are_never_trained_on():
    rng = random.Random(13)
    trained = {m["content"] for _ in range(400) for m in chat.scene(rng, "beyond").messages}
    unseen = {chat.scene(rng, "beyond_unseen").messages[0]["content"] for _ in range(100)}
    assert not trained & unseen
    assert {chat.scene(rng, kind).answer for kind in ("beyond", "beyond_unseen")} == {chat.SORRY}


def test_rows_hold_whole_documents_and_every_token_its_weight():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    rng = random.Random(7)
    for _ in range(40):
        _, pieces = documents.document(rng, "world")
        ids, weight = documents.encode(tokenizer, pieces)
        assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == "".join(t for t, _ in pieces)
        assert ids[-1] == documents.END and len(weight) == len(ids)

    def endless():
        while True:
            yield documents.encode(tokenizer, documents.document(rng, "skills")[1])

    rows = documents.pack(endless(), 256)
    for _ in range(5):
        row, first, weight = next(rows)
        assert first[0] and len(row) == len(first) == len(weight) == 256
        starts = first.nonzero()[0]
        assert all(row[s - 1] == documents.END for s in starts[1:])


def test_keys_and_values_are_single_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    for word in [*words.NAMES, *words.THINGS, *skills.COPY_WORDS, *words.NUMBERS]:
        assert len(tokenizer.encode(" " + word, add_special_tokens=False).ids) == 1, word


def test_a_new_tokenizer_keeps_keys_and_values_whole():
    pytest.importorskip("tokenizers")
    from tools.tiny import tokenizer as trained

    tokenizer = trained.train(2048, seed=1, count=150)
    for word in [
        *words.NAMES,
        *words.THINGS,
        *skills.COPY_WORDS,
        *words.NUMBERS,
        *words.CITIES,
        *words.WEATHER,
    ]:
        assert len(tokenizer.encode(" " + word, add_special_tokens=False).ids) == 1, word
    for i, special in enumerate(trained.SPECIALS):
        assert tokenizer.encode(special, add_special_tokens=False).ids == [i]


def test_the_longest_copied_run_is_found():
    from tools.tiny.evaluate import longest_runs

    corpus = ["the cat sat on the mat", "a dog ran off"]
    assert longest_runs(["one cat sat on a hat", "a dog ran", "fish", "mat a dog"], corpus) == [3, 3, 0, 2]
