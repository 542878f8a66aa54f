"""Laws of the text that the embedded model learns from (tools/tiny/stories)."""

import random
import re
from pathlib import Path

import pytest

from tools.tiny.stories import chat, check, documents, plots, skills, tell, words

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "refengine/models/tiny"


@pytest.fixture(scope="module")
def told():
    """Six stories of every plot."""
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
        items, number = re.fullmatch(r"Count:(.*)\nAnswer: (\w+)\.", text).groups()
        assert words.NUMBERS.index(number) == len(items.split())


def test_questions_about_a_story_are_answered_from_its_cast(told):
    for story in told:
        for question, answer in story.questions:
            assert question.endswith("?") and answer.endswith(".")
            names = set(re.findall(r"\w+", question + answer)) & set(words.NAMES)
            assert names <= {story.values["H"], story.values.get("F")}


def test_chats_are_rendered_as_the_template_renders_them():
    jinja = pytest.importorskip("jinja2.sandbox")
    template = jinja.ImmutableSandboxedEnvironment().from_string(
        (ROOT / "refengine/models/tiny/chat_template.jinja").read_text()
    )
    rng = random.Random(6)
    for _ in range(60):
        turns, thinking = [chat.turn(rng) for _ in range(rng.randint(1, 3))], rng.random() < 0.5
        messages = []
        for user, thought, answer in turns:
            messages.append({"role": "user", "content": "".join(t for t, _ in user)})
            messages.append(
                {
                    "role": "assistant",
                    "content": "".join(t for t, _ in answer),
                    "reasoning_content": thought if thinking else "",
                }
            )
        assert (
            template.render(messages=messages) == "".join(t for t, _ in chat.render(turns, thinking)) + "\n"
        )


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


def test_the_longest_copied_run_is_found():
    from tools.tiny.evaluate import longest_runs

    corpus = ["the cat sat on the mat", "a dog ran off"]
    assert longest_runs(["one cat sat on a hat", "a dog ran", "fish", "mat a dog"], corpus) == [3, 3, 0, 2]
