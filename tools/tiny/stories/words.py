# ruff: noqa: SIM905 (word lists read better as words)
"""The lexicon of the small world: every value that a slot of a story template can take.

Names and things double as the keys and values of the recall skills, so the tokenizer must keep each of them
one token when a space stands before it (a test holds it to that).
"""

GIRLS = (
    "Mia Lily Anna Ella Rosa Nora Zoe Lucy Ivy Maya Clara Ruby Emma Sara Tina Lena Kate Jane Nina Dora Hana "
    "Leila Wren Pia"
).split()
BOYS = (
    "Tom Ben Sam Max Leo Finn Jack Noah Omar Hugo Otto Tim Luke Adam Eli Ravi Kofi Carl Paul Dan Nils Theo "
    "Ivan Bo"
).split()
NAMES = GIRLS + BOYS

# Small things a child can carry, lose, lend and find again.
THINGS = (
    "ball kite drum hat key coin cup book doll boat bell lamp ring map shell flute scarf basket button "
    "whistle marble feather ribbon mirror puzzle wagon sled brush spoon clock candle umbrella glove boot "
    "rope bucket "
    "shovel pebble lantern compass trumpet crayon pencil blanket pillow jar bottle horn necklace crown mask "
    "cape magnet robot train truck violin stamp purse fan"
).split()

PETS = "dog cat puppy kitten rabbit pony duck hen goat lamb parrot turtle hamster mouse".split()
PET_NAMES = (
    "Spot Pepper Biscuit Patch Coco Pip Muffin Daisy Rex Socks Button Ginger Snowy Bella Toby Clover".split()
)
WILD = (
    "fox owl bear squirrel hedgehog deer frog crow robin beaver badger swan otter mole hare heron raccoon "
    "sparrow"
).split()
PLACES = (
    "park beach forest garden lake river meadow hill market barn farm library school mill harbor castle cave "
    "orchard playground bakery museum valley pond station"
).split()
FOODS = (
    "bread cake soup pie jam honey cheese porridge rice pudding apples berries cookies pancakes plums pears "
    "cherries carrots muffins waffles"
).split()
COLORS = "red blue green yellow purple orange pink white brown silver golden gray".split()
GROWNUPS_F = "mother grandmother aunt".split()
GROWNUPS_M = "father grandfather uncle".split()
GROWNUPS = GROWNUPS_F + GROWNUPS_M
HELPERS = (
    "baker farmer teacher gardener fisherman carpenter painter sailor shepherd doctor miller tailor "
    "librarian postman clockmaker musician"
).split()
TRAITS = (
    "curious kind brave shy cheerful clever quiet gentle careful busy friendly patient lively thoughtful "
    "loyal stubborn dreamy playful helpful bold"
).split()
NUMBERS = "zero one two three four five six seven eight nine ten".split()
CITIES = (
    "Paris London Rome Berlin Madrid Oslo Tokyo Cairo Lima Delhi Boston Dublin Vienna Athens Prague "
    "Lisbon Moscow Sydney Toronto Chicago Geneva Milan Seoul Warsaw"
).split()
WEATHER = "sunny rainy cloudy windy snowy foggy stormy warm cold hot".split()
FLOWERS = "roses tulips daisies sunflowers lilies violets poppies".split()

# Slot letter -> the values it may take. One value per story: that is what `check` verifies.
SLOTS = {
    "H": NAMES,
    "F": NAMES,
    "T": THINGS,
    "U": THINGS,
    "P": PLACES,
    "Q": PLACES,
    "A": PETS,
    "V": PET_NAMES,
    "B": WILD,
    "K": FOODS,
    "C": COLORS,
    "G": GROWNUPS,
    "O": HELPERS,
    "J": TRAITS,
    "N": NUMBERS[2:8],
    "L": FLOWERS,
}

# Two slots of one pool never share a value inside a story.
DISTINCT = (("H", "F"), ("T", "U"), ("P", "Q"))


def is_female(value):
    """Return whether a name or a grown-up takes 'she'."""
    return value in GIRLS or value in GROWNUPS_F


PRONOUNS = {
    "he": ("he", "she"),
    "his": ("his", "her"),
    "him": ("him", "her"),
    "himself": ("himself", "herself"),
    "boy": ("boy", "girl"),
    "son": ("son", "daughter"),
}
