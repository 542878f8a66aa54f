"""Openings, scenes, asides and endings that any plot may use. One paraphrase group a line, alternatives
by ||."""

OPENING = """
Once upon a time, there was a [little|young|small] {boy} named {H}. || Once upon a time, there lived a
    {boy} whose name was {H}.
Once upon a time, {a J} {boy} named {H} lived [near <a P>|in a small town|in a quiet village|at the edge
    of a town|in a tall house|in a little house]. {H} was {a J} child and [everyone liked|all the
    neighbors knew] {him}.
Once upon a time, in a [little|small|quiet|sunny|faraway] [town|village|valley], there lived {a J} {boy}
    named {H}.
Once upon a time, there was {a J} {boy} named {H}. {He} lived with {his} family in [a house with a blue
    door|a cottage with a red roof|a house on a hill|a small house by the road|an old house full of
    books].
There was once {a J} {boy} called {H}. || There once was a {boy} called {H} who was very {J}.
{H} was {a J} {boy} who lived [by the sea|near the woods|next to a farm|in a busy town|on a long
    street|above a shop]. || {H} was a [little|young] {boy}, and everyone said that {he} was {J}.
Long ago, in a [land of hills|land of rivers|town by the sea|village in the mountains], there lived {a J}
    {boy} named {H}.
"""

SCENE = """
The sun was [shining|bright|warm], and the sky was [blue|clear]. || It was a [warm|bright|lovely|fine]
    day. || Birds sang in the trees, and bees hummed in the flowers.
The wind was [soft|cool|gentle|strong], and [white|gray|small|fluffy] clouds sailed over the roofs. || It
    was a [cool|gray|quiet|long] day, and [the whole town|the street|the village] seemed to be waiting for
    something.
The [grass|road|garden] was still wet from the night. || The air smelled of [rain|flowers|fresh
    bread|hay|pine trees|salt]. || [Mist|Fog|Smoke] lay over the [fields|roofs|fences], and everything was
    quiet.
{He} liked [to sing|to draw|to run|to read|to climb trees|to count the stars|to ask questions|to listen to
    stories|to jump in puddles|to watch the clouds]. || Every day {he} [learned|tried|found|dreamed of]
    something new.
"""

ASIDE = """
A [little|tiny|small|plump|brown] [sparrow|robin|pigeon|crow] watched from [the roof|a branch|the fence|a
    wall]. || Far away, a bell [rang|chimed]. || Somewhere a dog barked. || A [yellow|white|striped]
    butterfly flew by.
The [clock|old clock] on the tower struck [nine|ten|eleven]. || The wind [whispered|rustled] in the
    leaves. || {H} [hummed|whistled] a [happy|merry|little|cheerful] tune.
"""

ENDING = """
From that day on, {H} was [happy|very happy|glad|proud and happy]. || And so the day ended [well|happily],
    and {H} [slept|slept soundly|dreamed sweet dreams|smiled in <his> sleep]. || That night, {H} fell
    asleep with a smile.
In the evening, {H} told the [whole|long|funny] story at [home|dinner|supper], and everyone
    [laughed|listened|smiled|clapped]. || That night the [moon|stars] shone through the window, and {H}
    [felt safe and warm|had a wonderful dream].
And {H} never forgot that [day|wonderful day|strange day|adventure]. || And they all lived happily ever
    after. || What a [day|lovely day|wonderful day] it had been! || It was the best day of all.
From then on, {H} and {F} were [best friends|good friends|the best of friends]. || After that, {F} and {H}
    [played|met|shared everything] every day. || On the way home, {H} and {F} [sang|laughed|held
    hands|talked and talked].
{H} had learned that [it is good to share|kind words help|friends help each other|patience pays off|it is
    brave to say sorry|small things matter|asking for help is wise|telling the truth is best|even little
    ones can help].
"""

TEXT = {"opening": OPENING, "scene": SCENE, "aside": ASIDE, "ending": ENDING}
