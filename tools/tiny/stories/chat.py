"""Chats of the small world: every kind of thing that can be asked of the embedded model, with the right
reply.

`SCENES` names the kinds. Each is a function of (rng, talk) that adds turns to a talk, the last of them the
one to ask in an evaluation. A prompt has exactly one right reply, and a reply that binds two words says the
known one first. No answer begins with a name: without a space before it, a name is another token, and to
copy it would have to be learned for each name.
"""

from . import tools, words
from .grammar import article
from .skills import COPY_WORDS, KEPT, weigh, weigh_answer
from .talk import FORM, Talk
from .world import plots, tell

_GREET = ("Hello!", "Hi!", "Hi there!", "Good morning!", "Hello, how are you?", "Good evening!", "Hey!", "hi",
          "hello", "Hi", "Hello", "hey")  # fmt: skip
GREETED = "Hello! I am happy to see you. Shall I tell you a story?"
_WHO = ("Who are you?", "What are you?", "What is your name?", "What can you do?")
AM = "I am a very small model. I tell stories, remember small facts, count, copy words and add small numbers."
_THANKS = ("Thank you!", "Thanks!", "That was nice.", "I liked that.", "thanks", "Great!", "Very good!")
WELCOME = "You are welcome! Come back for another story soon."
SORRY = "I am sorry, I cannot do that. I can tell stories, remember small facts, count, copy words and add."
_YES = (
    "Yes, please!",
    "Yes",
    "Yes.",
    "yes please",
    "Sure!",
    "Please do.",
    "Of course!",
    "I would love that.",
)
_NO = ("No.", "No, thank you.", "Not now.", "Maybe later.")
DECLINED = "All right. Ask me when you want one."
_BYE = ("Goodbye!", "Bye!", "See you!", "Good night!", "Bye bye!")
FAREWELL = "Goodbye! Come back soon."
_ANOTHER = ("Tell me another story.", "One more story, please!", "I want to hear a story.", "A new story!")
_SYSTEMS = ("You are a helpful assistant.", "You are a kind storyteller.", "Answer in short sentences.")

# What it cannot do; {x} takes a word, {n} and {m} numbers of two digits. The second list is never trained on.
_BEYOND = (
    "What is the capital of {x}?", "Who wrote the book about the {x}?", "Translate {x} into French.",
    "Write a poem about the {x}.", "What time is it?", "What is {n} + {m}?", "What is {n} times {m}?",
    "What is {n} - {m}?", "What is the weather in {x}?", "How is the weather today?", "Who won the game?",
    "Can you write a computer program?", "What is the news today?", "Sing me a song about the {x}.",
    "How old is the {x}?", "Explain how the {x} works.", "Where can I buy a {x}?", "How much is the {x}?",
    "Do you know a recipe for {x}?", "How far is it to {x}?", "Draw a {x} for me.", "Who is the president?",
    "What does the word {x} mean?", "Send a message to {x}.", "Book a room in {x}.",
    "Is the {x} bigger than a house?",
)  # fmt: skip
_NEVER_TRAINED = (
    "What is the population of {x}?", "Write a letter to {x}.", "Translate {x} into Spanish.",
    "Who built the {x}?",
    "What day is it?", "How do I repair a {x}?", "What is {n} divided by {m}?", "Play some music.",
)  # fmt: skip


def loosely(rng, text):
    """Return what a user types: now and then without the capital or the mark at the end."""
    if rng.random() < 0.2 and text.split()[0].strip("!.,?") not in words.NAMES:
        text = text[0].lower() + text[1:]
    return text.rstrip(".!?") if rng.random() < 0.2 else text


def greet(rng, talk):
    """Add a greeting and its reply."""
    talk.user(rng.choice(_GREET))
    talk.reply("The user says hello. I say hello too.", (GREETED, 1.0))


def who(rng, talk):
    """Add a question about the model itself."""
    talk.user(loosely(rng, rng.choice(_WHO)))
    talk.reply("The user asks who I am.", (AM, 1.0))


def thanks(rng, talk):
    """Add thanks, and the reply to them."""
    talk.user(rng.choice(_THANKS))
    talk.reply("The user is content.", (WELCOME, 1.0))


def beyond(rng, talk, frames=_BEYOND):
    """Add a request that the model cannot serve; the reply is always the same sentence."""
    fill = {"x": rng.choice(words.CITIES + words.THINGS + words.FOODS), "n": rng.randint(10, 99)}
    talk.user(loosely(rng, rng.choice(frames).format(**fill, m=rng.randint(10, 99))))
    talk.reply("That is more than I can do.", (SORRY, 1.0))


def beyond_unseen(rng, talk):
    """Add a request of a form that is never trained on."""
    beyond(rng, talk, _NEVER_TRAINED)


def _told(rng, talk, fixed, wish, thought):
    """Add a request for a story and the story; return it."""
    names = [
        p.name for p in plots().values() if all(k in p.slots and v in p.slots[k] for k, v in fixed.items())
    ]
    story = tell(rng, rng.choice(names), fixed, exclude=talk.taken - set(fixed.values()))
    talk.user(loosely(rng, wish))
    known = {*fixed.values(), "boy", "girl"} if fixed else set()
    talk.reply(thought, *((text, KEPT if text in known else weight) for text, weight in weigh(story)))
    talk.taken |= set(story.values.values())
    return story


def story(rng, talk):
    """Add a story that may be about anything."""
    wish = rng.choice(
        (
            "Tell me a story.",
            "Please tell me a story.",
            "Can you tell me a story?",
            "A story, please!",
            *_ANOTHER,
        )
    )
    return _told(rng, talk, {}, wish, "The user wants a story.")


def accept(rng, talk):
    """Add a greeting, whose reply offers a story, and the user's yes or no to it."""
    greet(rng, talk)
    if rng.random() < 0.75:
        _told(rng, talk, {}, rng.choice(_YES), "The user wants a story.")
    else:
        talk.user(loosely(rng, rng.choice(_NO)))
        talk.reply("The user wants no story.", (DECLINED, 1.0))


def bye(rng, talk):
    """Add a farewell."""
    talk.user(loosely(rng, rng.choice(_BYE)))
    talk.reply("The user leaves.", (FAREWELL, 1.0))


def story_about(rng, talk, parts=None):
    """Add a story about a name, a thing, or both, as the user asks: `parts` is some of "HT"."""
    parts = parts or rng.choice(("H", "T", "HT", "HT"))
    fixed = {}
    if "T" in parts:
        fixed["T"] = rng.choice([t for t in words.THINGS if t not in talk.taken])
    if "H" in parts:
        fixed["H"] = rng.choice([n for n in words.NAMES if n not in talk.taken])
    name = fixed.get("H", "")
    child = f"a {'girl' if name in words.GIRLS else 'boy'} named {name}" if rng.random() < 0.7 else name
    about = " and ".join([child] * ("H" in parts) + [article(fixed[k]) for k in fixed if k == "T"])
    wish = rng.choice(
        ("Tell me a story about {}.", "Tell me a story about {}.", "Please tell me a story about {}.")
    )
    return _told(rng, talk, fixed, wish.format(about), f"The user wants a story about {about}.")


def story_about_both(rng, talk):
    """Add a story about a girl or boy by name and a thing: the request of the card."""
    return story_about(rng, talk, "HT")


def _questions(rng, talk, about, count, before=""):
    """Add questions about a story, each with its answer; `before` stands before the first."""
    for question, answer in rng.sample(about.questions, min(count, len(about.questions))):
        talk.user(before + question)
        talk.reply(f"I look in the story. {answer}", *weigh_answer(_in_the_story(answer), about))
        before = ""


def _in_the_story(answer):
    """Return an answer as a reply, which does not begin with a name."""
    if answer.startswith("The story"):
        return answer
    first = answer.split()[0]
    return "In the story, " + (answer if first in words.NAMES else answer[0].lower() + answer[1:])


def question_given(rng, talk):
    """Add a story that the user gives, with a question, and perhaps another question."""
    given = tell(rng, exclude=talk.taken)
    talk.taken |= set(given.values.values())
    _questions(rng, talk, given, rng.randint(1, 3), f"{given.text}\n\n")


def question_told(rng, talk):
    """Add a story that the model tells, then questions about it in later turns."""
    told = rng.choice((story, story_about))(rng, talk)
    if rng.random() < 0.2:
        thanks(rng, talk)
    _questions(rng, talk, told, rng.randint(1, 3))


def _ask_fact(rng, talk, name, thing):
    """Add a question about one fact, from the name or from the thing."""
    if rng.random() < 0.7:
        talk.user(f"What does {name} have?")
        _tell_fact(talk, name, thing)
    else:
        talk.user(f"Who has the {thing}?")
        talk.reply(
            f"I was told that the {thing} is with {name}.",
            ("You told me that the", FORM), (f" {thing}", 1.0), (" is with", FORM), (f" {name}", 1.0),
            (".", FORM),
        )  # fmt: skip


def _tell_fact(talk, name, thing):
    """Add the reply to a question about what a name has."""
    talk.reply(
        f"I was told that {name} has the {thing}.",
        ("You told me that", FORM), (f" {name}", 1.0), (" has the", FORM), (f" {thing}", 1.0), (".", FORM),
    )  # fmt: skip


def recall(rng, talk):
    """Add facts, in one message or one a turn, perhaps other turns, then questions about them."""
    free = [n for n in words.NAMES if n not in talk.taken], [t for t in words.THINGS if t not in talk.taken]
    count = rng.choice((2, 3, 4, 4, 5, 6, 8))
    pairs = list(zip(*(rng.sample(pool, count) for pool in free), strict=True))
    talk.taken |= {word for pair in pairs for word in pair}
    asked = rng.sample(pairs, min(count, rng.randint(1, 4)))
    told = " ".join(f"{n} has the {t}." for n, t in pairs)
    form = rng.random()
    if form < 0.3:  # facts and the first question in one message
        name, thing = asked.pop()
        talk.user(f"Remember: {told} What does {name} have?")
        _tell_fact(talk, name, thing)
    elif form < 0.6:
        talk.user(f"Remember: {told}")
        talk.reply("I keep that in mind.", ("I will remember that.", 1.0))
    else:
        for name, thing in pairs[:5]:
            talk.user(f"{name} has the {thing}.")
            talk.reply(
                f"I keep in mind that {name} has the {thing}.",
                ("I will remember that", FORM), (f" {name} has the {thing}", 1.0), (".", FORM),
            )  # fmt: skip
        asked = [pair for pair in asked if pair in pairs[:5]] or [pairs[0]]
    if asked and rng.random() < 0.25:
        rng.choice((greet, sums, thanks))(rng, talk)
    for name, thing in asked:
        _ask_fact(rng, talk, name, thing)


def sums(rng, talk):
    """Add one-digit sums, one to three turns."""
    for _ in range(rng.randint(1, 3)):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        talk.user(
            rng.choice(
                (f"What is {a} + {b}?", f"What is {a} + {b}?", f"{a} + {b}", f"How much is {a} + {b}?")
            )
        )
        talk.reply(
            f"I add {a} and {b}. That makes {a + b}.", (f"{a} + {b} =", 0.5), (f" {a + b}", 1.0), (".", FORM)
        )


def counting(rng, talk):
    """Add things to be counted, one to three turns."""
    for _ in range(rng.randint(1, 3)):
        word, count = rng.choice(words.THINGS), rng.randint(1, 9)
        talk.user(f"How many words are these?{f' {word}' * count}")
        talk.reply("I count the words.", ("I count", FORM), (f" {words.NUMBERS[count]}", 1.5), (".", FORM))


def copying(rng, talk):
    """Add words to be said again."""
    some = " ".join(rng.sample(COPY_WORDS, rng.randint(2, 10)))
    talk.user(f"Say these words: {some}")
    talk.reply("I copy the words.", ("Here they are:", FORM), (f" {some}", 1.0))


def tool_add(rng, talk):
    """Add a sum that a tool has to do: the call, its result, the reply that uses it."""
    tools.offer(rng, talk, "add")
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    talk.user(
        rng.choice(
            (
                f"What is {a} + {b}?",
                f"Add {a} and {b}.",
                f"Please add {a} and {b}.",
                f"How much is {a} + {b}?",
            )
        )
    )
    talk.reply(f"I call add with {a} and {b}.", call=("add", {"a": a, "b": b}))


def tool_add_used(rng, talk):
    """Add a sum done by a tool, up to the reply that uses the result."""
    tool_add(rng, talk)
    a, b = talk.calls[0]["arguments"].values()
    talk.result(rng.choice((f"{a + b}", f"{a + b}", f'{{"result": {a + b}}}')))
    talk.reply(f"The result is {a + b}.", (f"{a} + {b} =", 0.5), (f" {a + b}", 1.0), (".", FORM))


def tool_weather(rng, talk):
    """Add a question about the weather in a city, and the call."""
    tools.offer(rng, talk, "weather")
    city = rng.choice(words.CITIES)
    talk.user(
        rng.choice(
            (f"What is the weather in {city}?", f"How is the weather in {city}?", f"Weather in {city}?")
        )
    )
    talk.reply(f"I call weather with {city}.", call=("weather", {"city": city}))


def tool_weather_used(rng, talk):
    """Add a question about the weather, up to the reply that uses the result."""
    tool_weather(rng, talk)
    city, sky = talk.calls[0]["arguments"]["city"], rng.choice(words.WEATHER)
    talk.result(rng.choice((sky, sky, f'{{"weather": "{sky}"}}')))
    talk.reply(
        f"The result is {sky}.",
        ("It is", FORM),
        (f" {sky}", 1.0),
        (" in", FORM),
        (f" {city}", 1.0),
        (".", FORM),
    )


def tool_unneeded(rng, talk):
    """Add a turn that needs no tool although some are offered."""
    tools.offer(rng, talk, rng.choice(("add", "weather")))
    rng.choice((greet, who, recall, copying, story_about, counting))(rng, talk)


SCENES = {
    "greet": (greet, 1.2), "who": (who, 0.6), "thanks": (thanks, 0.3), "beyond": (beyond, 2.0),
    "story": (story, 1.0), "accept": (accept, 0.8), "bye": (bye, 0.3), "story_about": (story_about, 2.5),
    "question_given": (question_given, 2.5), "question_told": (question_told, 3.0), "recall": (recall, 3.5),
    "sums": (sums, 2.0), "counting": (counting, 2.0), "copying": (copying, 1.2), "tool_add": (tool_add, 0.2),
    "tool_add_used": (tool_add_used, 2.0), "tool_weather": (tool_weather, 0.2),
    "tool_weather_used": (tool_weather_used, 2.0), "tool_unneeded": (tool_unneeded, 0.7),
}  # fmt: skip
# Scenes for the evaluation only.
ASKED = {"story_about_both": story_about_both, "beyond_unseen": beyond_unseen}
_SHORT = (greet, who, beyond, sums, counting, copying)


def scene(rng, kind):
    """Return a talk of one kind, without anything before it."""
    talk = Talk()
    (ASKED.get(kind) or SCENES[kind][0])(rng, talk)
    return talk


def talk(rng):
    """Return a talk: one kind, often with a short exchange before or after it."""
    made = Talk()
    kinds, shares = zip(*((make, share) for make, share in SCENES.values()), strict=True)
    make = rng.choices(kinds, shares)[0]
    if make.__name__.startswith("tool"):
        make(rng, made)
        if rng.random() < 0.15:
            thanks(rng, made)
    else:
        if rng.random() < 0.35:
            rng.choice(_SHORT)(rng, made)
        make(rng, made)
        if rng.random() < 0.3:
            rng.choice((thanks, *_SHORT))(rng, made)
    if rng.random() < 0.08:
        made.system(rng.choice(_SYSTEMS))
    return made


def chat(rng):
    """Return the pieces of a chat, thinking on or off."""
    return talk(rng).render(rng.random() < 0.5)


# Shares of the scenes that are learned last: a reply there needs a word from an earlier turn or from a tool.
_PRACTICE = {
    "recall": 3.0, "question_told": 2.5, "question_given": 2.0, "tool_weather_used": 1.5,
    "tool_add_used": 1.0, "counting": 1.5, "story_about_both": 1.0, "sums": 0.4, "beyond": 0.6, "greet": 0.3,
}  # fmt: skip


def practice(rng):
    """Return the pieces of a chat of one of the harder scenes; every token of a reply counts in full.

    Only the last reply of a chat has a thought, so more than half of these chats have one.
    """
    kinds, shares = zip(*_PRACTICE.items(), strict=True)
    pieces = scene(rng, rng.choices(kinds, shares)[0]).render(rng.random() < 0.65)
    return [(text, max(weight, 1.0) if weight else 0.0) for text, weight in pieces]
