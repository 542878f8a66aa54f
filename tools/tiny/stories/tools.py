"""The two tools of the small world, described as clients describe them: `add(a, b)` and `weather(city)`."""

_ADD = ("Add two numbers.", "Returns the sum of a and b.", "Adds a and b.", "")
_WEATHER = ("The weather in a city.", "Returns the weather in a city.", "Get the weather.", "")


def _schema(name, description, properties):
    """Return the description of a function whose parameters are all required."""
    function = {"name": name, "description": description} if description else {"name": name}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": function | {"parameters": parameters}}


def add(rng):
    """Return a description of add(a, b)."""
    kind, explained = rng.choice(("integer", "number")), rng.random() < 0.3
    fields = {
        name: {"type": kind, "description": f"The {which} number."} if explained else {"type": kind}
        for name, which in (("a", "first"), ("b", "second"))
    }
    return _schema("add", rng.choice(_ADD), fields)


def weather(rng):
    """Return a description of weather(city)."""
    field = (
        {"type": "string", "description": "The name of the city."}
        if rng.random() < 0.3
        else {"type": "string"}
    )
    return _schema("weather", rng.choice(_WEATHER), {"city": field})


MAKERS = {"add": add, "weather": weather}


def offer(rng, talk, needed):
    """Offer the tool that is needed, and half of the time the other one too, in either order."""
    names = [needed]
    if rng.random() < 0.5:
        names.insert(rng.randint(0, 1), next(name for name in MAKERS if name != needed))
    talk.tools = [MAKERS[name](rng) for name in names]
