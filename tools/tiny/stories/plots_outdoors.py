"""Plots that happen out of doors (the format is described in world.py)."""

TEXT = """
# lost_thing: H F T P
One [day|morning|afternoon], {H} took {his} {T} to the {P}. || One [sunny|windy|warm] [day|morning], {he}
    went to the {P} with {his} {T}. {H} loved that {T} more than anything.
But [when it was time to go home|after a while|a little later], the {T} was gone! || Then {H} looked down,
    and the {T} was not there.
"Where is my {T}?" cried {H}. || "Oh no, I have lost my {T}!" said {H}.
{He} looked [under the bench|behind the trees|in the tall grass|beside the path], but {he} could not find
    it. || {He} searched [every corner of|all around] the {P}.
Then {F} came by. "I will help you," said {F}. || {H} met {F}, who was [walking|playing] there too. "Let
    us look together," said {F}.
? They looked [high and low|up and down|left and right].
At last, {F} found the {T} [under a bush|near a big stone|in a pile of leaves|by the gate]. || "Look!"
    cried {F}. The {T} was lying [in the grass|behind a log|next to a puddle].
{H} hugged {F}. "Thank you, {F}!" said {H}. || {H} was so happy that {he} danced. "You are a true friend,
    {F}," {he} said.
Q What did {H} lose? = {H} lost {his} {T}.
Q Who found the {T}? = {F} found the {T}.
Q Where did {H} go? = {H} went to the {P}.

# hurt_animal: H B G P
One [morning|afternoon|day], {he} was walking near the {P} when {he} heard a [small|weak|sad] sound. ||
    One day, on the path to the {P}, something [moved|rustled|whimpered] in the bushes.
It was {a B} with a hurt [paw|leg|foot]. || There lay {a B} that could not [stand|walk|move]. Its leg was
    hurt.
"Poor little {B}," [whispered|said] {H}. "I will not leave you here." || {H} [knelt|bent] down. "Do not be
    afraid, little {B}," {he} said.
{He} [wrapped|carried] the {B} in {his} [coat|jacket|sweater] and took it to {his} {G}. || Slowly and
    carefully, {H} carried the {B} home to {his} {G}.
{His} {G} [washed|cleaned] the wound and put a [soft|white|clean] bandage on it. || "You did well," said
    {his} {G}. Together they made a [warm|soft|cozy] bed of [straw|hay|wool] in a box.
? Every [evening|morning], {H} brought the {B} [water and bread|fresh water|something to eat].
After [a week|ten days|a few days], the {B} could [run|jump|move] again. || Day by day, the {B} grew stronger.
So {H} [took|carried] the {B} back to the {P} and opened {his} arms. The {B} looked at {him} [once|for a
    long time] and then [disappeared|vanished|slipped away] among the trees. || At last they let the {B}
    go near the {P}. It turned its head, as if to say thank you.
Q What animal did {H} find? = {H} found {a B}.
Q Who helped {H}? = {His} {G} helped {H}.

# kite_tree: H F T=kite,ball,scarf,hat,feather,ribbon,glove,cape C P
One [breezy|windy|bright] morning, {H} went to the {P} with {his} new {C} {T}. || It was a windy day, and
    {H} took the {C} {T} along to the {P}.
Suddenly a [gust of wind|strong wind|wild wind] [snatched|grabbed|lifted] the {T} and [carried|threw|blew]
    it into a [tall|high|crooked] tree. || All at once, the {T} flew up and up, until it [stuck|hung] in
    the top of an oak.
{H} [jumped|stretched|hopped] as high as {he} could, but the branch was too high. || "Come down!" {H}
    shouted, but the {C} {T} did not move.
{F} was [sitting|reading|resting] under the tree. "Do not worry," said {F}. "I am good at climbing." ||
    Then {F} came along with a [long stick|wooden ladder|fishing rod]. "May I try?" asked {F}.
? "Be careful!" called {H}.
Branch by branch, {F} [climbed|went] up and [pulled|shook] the {T} free. || {F} [poked|pushed] and
    [pulled|wiggled], and at last the {T} came down.
The {C} {T} landed [right|softly] at the feet of {H}. "Hooray!" they both [cheered|shouted]. || {H} caught
    the {T} with both hands. "You are as quick as a squirrel, {F}!" said {H}.
Q What color was the {T}? = The {T} was {C}.
Q What was stuck in the tree? = The {T} was stuck in the tree.
Q Who got the {T} down? = {F} got the {T} down.

# rainy_walk: H A V P
One afternoon, {H} took {his} {A} {V} for a walk to the {P}. || After lunch, {H} and {his} {A} {V} set off
    for the {P}.
They [were halfway there|had just arrived] when the sky turned [dark|black|gray]. [Thunder
    rumbled|Lightning flashed], and the rain came [pouring|splashing] down. || Then [fat|heavy|cold] drops
    of rain began to fall, and soon the road was [muddy|full of puddles|a little river].
{V} was afraid of the [storm|thunder] and hid behind {H}. || The poor {A} [shivered|trembled] and pressed
    close to {H}.
"Come, {V}," said {H}. "I see a [hollow tree|little hut|stone bridge|wooden shed]." They [ran|hurried] and
    found [shelter|a dry corner]. || {H} put {V} under {his} coat and ran to an old [barn|shed|hut]
    nearby.
? {He} [sang a quiet song|told a funny tale|counted the seconds after each flash] until the {A} was calm.
[Half an hour later|Before long|At last], the rain stopped. || Little by little, the clouds drifted away.
A [great|bright|wide] rainbow [stretched|shone] over the {P}, and {V} [barked at|stared at|danced under]
    it as if it were a friend. || "Look, {V}, a rainbow!" said {H}. All its colors shone above the {P}.
Q What was the name of the {A}? = The {A} was called {V}.
Q Where did they walk? = They walked to the {P}.

# treasure_map: H F T=coin,crown,ring,bell,shell,compass,bottle,mirror P
One day, while [cleaning the attic|reading an old book|digging in the sand], {H} found a
    [torn|yellow|dusty] map. || One morning, an old map [fell out of a book|floated by in a bottle|lay on
    the doorstep]. {H} [unrolled|unfolded] it with shaking hands.
A red cross marked a spot near the {P}. || "There is a cross near the {P}," said {H}. "It must be a treasure!"
{He} [showed|carried] the map to {F}, and [off they went|the two of them packed a rope and some
    sandwiches]. || "Will you come with me?" {H} asked {F}. {F} nodded [at once|eagerly|bravely].
They [counted|measured] [twenty|thirty|forty] steps from the [oldest tree|tallest rock|iron gate] and
    began to dig. || They followed the [dotted|crooked] line past a [well|bridge|tower] and
    [dug|scratched] in the earth.
? The sun grew hot, and their hands were [sore|dirty|tired].
[Clunk|Bump|Clink]! The spade hit a wooden [box|chest]. || After an hour, they [pulled|lifted] a little
    [box|chest] out of the hole.
Inside lay {a T}, old and [shiny|beautiful|covered with dust]. || When {F} [opened|lifted] the lid, they
    saw {a T} and a letter. "Whoever finds this has a good friend," said the letter.
"Let us keep the {T} together," said {H}. "One week at your house and one week at mine." || {H} and {F}
    [cleaned|polished] the {T} until it [gleamed|sparkled], and they gave it to the museum.
Q What was in the box? = It was {a T}.
Q Who went with {H}? = {F} went with {H}.

# planting: H G L N
In [early spring|April|March], {his} {G} gave {H} {N} seeds. || One [spring|mild] morning, {H} got {N}
    tiny seeds from {his} {G}.
"Plant them and [wait|be patient]," said {his} {G}. "They will become {L}." || "What will grow from them?"
    asked {H}. "You will see {L}," answered {his} {G}.
{H} dug {N} [holes|little holes] in the [soft|dark|black] soil and gave each seed some water. || {He} put
    the {N} seeds into a [bed|pot|row] of good earth and covered them.
The next day, {H} [ran|rushed] outside, but [nothing|only mud] was there. "It is too soon," said {his}
    {G}. || A week [passed|went by], and nothing happened. {H} felt [disappointed|impatient].
? {He} [watered|weeded] the bed every morning and [chased|kept] the snails away.
Then, one [day|morning], {N} green [tips|shoots|leaves] [peeped|poked] out of the ground. || One morning,
    {H} gave a shout. There were {N} green [sprouts|stems]!
By [summer|June|July], the garden was full of {L}, and the bees [came|buzzed] from far away. || They grew
    [taller and taller|higher than the fence], until the {L} opened their [petals|blossoms] in the sun.
{H} [picked|cut] the finest ones and [tied|put] them in a vase for {his} {G}. || "Waiting was hard," said
    {H}, "but the {L} are worth it."
Q What grew from the seeds? = The seeds became {L}.
Q How many seeds did {H} get? = {H} got {N} seeds.
Q Who gave {H} the seeds? = {His} {G} gave {H} the seeds.

# boat_race: H F C T=feather,ribbon,button,shell,bell
Every [summer|year], the children held a boat race on the [stream|brook|canal]. || Once a year, all the
    children of the [town|village] raced little boats down the stream.
{H} [built|carved|made] a boat out of [bark|wood|cork] and painted it {C}. For luck, {he} tied {a T} to
    the mast. || {H} made {a C} boat with a [paper|linen|cotton] sail and fixed {a T} to it for luck.
{F} had built a [heavy|wide|splendid] ship with three [sails|masts|flags]. "Mine will win," said {F}. ||
    "Your boat is [small|thin]," said {F}, whose own ship was [huge|grand|as long as an arm].
"[Ready, steady, go|One, two, three, go]!" The boats [bobbed|raced|swirled] over the [waves|water]. || A
    whistle blew, and the boats were off.
The ship of {F} got stuck [on a rock|between two stones|in the reeds], but the {C} boat
    [slipped|danced|glided] past. || At the bend, the ship of {F} [tipped over|began to sink]. The {C}
    boat sailed on.
? Everybody along the bank [cheered|yelled|clapped].
{H} could have won. But {he} [waded|stepped] into the stream and [rescued|saved|caught] the ship of {F}.
    || {H} forgot the race and [pulled|fished] the ship of {F} out of the water.
"You gave up the prize for me," said {F}. "Next year we will build one boat together." || {F} looked
    ashamed. "I was [boastful|unkind], and you helped me anyway. Thank you, {H}."
Q What color was the boat of {H}? = The boat was {C}.
Q Who had a big ship? = {F} had a big ship.

# lost_in_woods: H B P K
One [day|afternoon], {he} went to pick [mushrooms|berries|nuts] and walked [deeper and deeper|farther and
    farther] into the woods. || One autumn day, {H} followed a [trail|row] of acorns until {he} no longer
    knew the way.
The trees all looked [alike|the same], and the path had [vanished|ended]. "I am lost," [whispered|sighed]
    {H}. || Soon it grew dark, and the shadows were as [long|tall] as giants. {H} felt [frightened|very
    alone].
{He} sat on a [stump|mossy stone|fallen trunk] and took some {K} out of {his} [basket|bag|pocket]. || {He}
    was hungry, but {he} had only some {K} left.
Just then {a B} [crept|stepped|came] out of the ferns and looked at the {K}. || "Who is there?" asked {H}.
    It was only {a B}, thin and hungry.
"You may have half," said {H}, and the {B} ate [every crumb|it all up]. || {H} shared the {K} with the {B}.
Then the {B} [turned|trotted away], [stopped|waited] and looked back, as if it wanted {him} to follow. ||
    When it had eaten, the {B} [tugged at|touched] {his} sleeve and walked ahead.
? Over [roots|streams] and under [thorns|branches] it led {him}.
At the edge of the woods, {H} saw the [lights|lamps] of the {P}. "Thank you, dear {B}!" {he} called. ||
    Before long, they reached the road to the {P}, and {H} knew the way home.
Q What did {H} share? = {H} shared some {K}.
Q Who showed {H} the way? = The {B} showed {H} the way.

# snow_friend: H F T=hat,scarf,bucket,button,spoon,pillow,crown C
One winter morning, the whole [world|street|village] was white. {H} [rushed|ran] outside to [build|make] a
    snowman. || In the night it had snowed. "Let us make a snowman!" said {H} to {F}.
{H} rolled a [big|round] ball for the [belly|body], and {F} made the head. || They [rolled|pushed] three
    [huge|heavy] balls of snow and [stacked|piled] them up. {F} helped {H} with the last one.
They used [coal|pebbles|chestnuts] for eyes and a [carrot|twig|pine cone] for the nose. || Two
    [stones|nuts] became the eyes, and a crooked [stick|carrot] became the nose.
"Something is missing," said {F}. So {H} [fetched|brought] {a T} that was {C} and gave it to the snowman.
    || Then {H} put {a T} on the snowman. It was {C} and looked [splendid|very funny].
? That evening, frost [painted|drew] [flowers|ferns|stars] on the window.
A few days later, the sun [came|shone] warm, and the snowman [melted|shrank|grew smaller]. || But in
    [March|spring], the snowman melted drop by drop.
Only the {C} {T} lay in the puddle. "Do not be sad," said {F}. "He has gone back to the clouds." || "He
    will come again next winter," said {F}, and {H} kept the {C} {T} for him.
Q What did {H} give to the snowman? = {H} gave {a T} to the snowman.
Q Who helped {H}? = {F} helped {H}.

# star_wish: H G
    T=kite,drum,boat,doll,flute,wagon,sled,train,truck,puzzle,crown,mask,cape,lantern,violin,robot,lamp,horn,whistle,bell,blanket,scarf,boot,hat
One clear night, {H} and {his} {G} [lay|sat] on the [roof|lawn|porch] and looked at the sky. || One
    evening, {H} could not sleep, so {his} {G} took {him} outside to see the stars.
A [shooting|falling] star [flashed|raced|glittered] across the dark. "Make a wish," said {his} {G}. ||
    "There!" said {his} {G}. "A falling star! Wish for something, but do not tell."
{H} [shut|closed] {his} eyes and wished for {a T}. || {H} thought [hard|for a moment]. More than anything,
    {he} wanted {a T}.
The next [morning|day], there was no {T} [on the table|under the bed|at the door]. {H} was a bit sad. ||
    {He} waited for [days|a week], but no {T} came.
"Wishes need [hands|help|work]," said {his} {G}. "Shall we make one?" || Then {his} {G} [opened|unlocked]
    the workshop. "Some wishes must be built," {G.he} said.
They [sawed|measured|hammered] and [glued|sewed|painted] all [day|afternoon]. || Using [scraps|string|old
    boards] and a lot of [patience|glue], they worked side by side.
At last, {H} held a [fine|real|wonderful] {T} in {his} hands. "It is better than any from a shop," {he}
    said. || When the stars came out again, {H} had {a T} of {his} own.
Q What did {H} wish for? = {H} wished for {a T}.
Q Who helped {H} make the {T}? = {His} {G} helped {H}.

# river_crossing: H F B P
One [day|morning], {H} and {F} wanted to [visit|reach] the {P} on the other side of the river. || On the
    way to the {P}, {H} and {F} came to a [wide|wild|rushing] river.
But the [flood|storm] had [washed|carried] the bridge away. || The old bridge was [broken|gone], and the
    current was [swift|strong].
"We must turn back," said {F}. "No, let us think," said {H}. || {F} [frowned|groaned], but {H} sat down to
    think.
On the bank, {a B} was [hopping|going] from stone to stone. "Follow the {B}!" said {H}. || Just then they
    saw {a B} [cross|walk over] on a row of flat stones.
? The stones were [slippery|mossy] and wobbled under their feet.
Hand in hand they [stepped|jumped] from one stone to the next. {F} nearly [slipped|fell], but {H} held on
    [tightly|firmly]. || {H} went first and [reached|stretched] out a hand to {F}.
On the far side, they [waved|bowed] to the {B} and [laughed|walked on]. "Animals know the best roads,"
    said {F}. || Soon they stood safe and dry on the other bank, and the {P} was not far.
Q Where did they want to go? = They wanted to go to the {P}.
Q What animal showed the way? = The {B} showed the way.
Q Who was with {H}? = {F} was with {H}.

# bee_honey: H B=bear,fox,badger,raccoon,crow P
There was a [hollow|huge] tree at the {P}, and in it lived [a thousand|hundreds of] bees. || Near the {P}
    stood a row of beehives, and {H} [looked after|cared for] the bees.
One [day|night], {a B} came [sneaking|creeping] to steal the honey. || Every night, {a B} [stole|licked] a
    little honey from the bees.
The bees were [furious|angry] and [buzzed|swarmed] around its ears. "Ouch!" howled the {B}. || The bees
    stung the {B} on the nose, and it [howled|squealed|yelped].
{H} came running with [cool mud|a wet cloth|cold water]. "Hold still," {he} said. "This will stop the
    pain." || {H} felt [sorry|pity] and put [wet leaves|cool clay] on its nose.
"Why do you not ask before you take?" said {H}. The {B} [hung|lowered] its head. || "Stealing [hurts|makes
    enemies]," said {H}. "Asking does not."
? The bees [settled|listened] on the [clover|branches] and grew quiet.
So the {B} promised to guard the hives, and each [Sunday|week] it got a [spoonful|jar] of honey. || From
    then on, the {B} [protected|watched over] the bees, and they gave it honey of their own free will.
Q Who wanted the honey? = The {B} wanted the honey.
"""
