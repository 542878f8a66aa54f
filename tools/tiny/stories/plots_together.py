"""Plots among friends, neighbors and animals (the format is described in world.py)."""

TEXT = """
# sharing: H F K=bread,cake,pie,cheese,pudding N
At noon, {H} sat down [in the shade|on a bench] with {N} pieces of {K}. || In the school yard, {H}
    unpacked {his} lunch, which was {K}.
{F} had forgotten {F.his} lunch and looked [hungry|sad]. || Next to {him} sat {F}, whose [bag|lunch box]
    was empty.
"I am hungry too," thought {H}, "and there is so little." || {H} turned away and [nibbled|chewed] quietly.
But the {K} did not taste [right|good] when somebody else was hungry. || Then {he} heard {F} swallow, and
    {he} felt [uneasy|ashamed].
"Would you like half?" asked {H}. || {H} moved closer and [held out|offered] half of the {K}.
"Really? Thank you!" said {F}, and {F.his} face [lit up|brightened]. || {F} took a bite and [beamed|grinned].
? A crumb fell down, and an ant carried it [home|away] like a treasure.
The next day, {F} brought [enough|lunch] for two. || "Half tastes better than all of it," said {H}.
Q What did {H} share? = {H} shared some {K}.
Q Who was hungry? = {F} was hungry.

# quarrel: H F T P
{H} and {F} both wanted to play with the same {T}. || There was only one {T} at the {P}, and two children
    wanted it, {H} and {F}.
"I saw it first!" shouted {H}. "No, I did!" shouted {F}. || {H} pulled on one side, and {F} pulled on the
    other.
They [pushed|shoved] and [argued|quarreled] until the {T} fell into the mud. || Neither would [give in|let
    go], and in the end both [sat|fell] in the dirt.
{F} went home without a word. {H} had the {T} now, but playing alone was [no fun|dull]. || For two whole
    days, they did not [speak|talk] to each other.
"I was wrong," thought {H}. {He} [wiped|cleaned] the {T} and went to find {F}. || On the third day, {H}
    took the {T} and knocked at the door of {F}.
"I am sorry," said {H}. "Me too," said {F}. || "You can have it," said {H}. "No, let us take turns," said {F}.
? They shook hands [solemnly|three times] and laughed about their muddy shoes.
First {F} played with the {T}, then {H}, and then they [invented|discovered] a game for both. || All
    afternoon at the {P} they played with the {T}, and there was no more [fighting|shouting].
Q What did they quarrel about? = They quarreled about the {T}.
Q With whom did {H} quarrel? = {H} quarreled with {F}.

# new_child: H F T=ball,rope,kite,drum,marble,puzzle,book,wagon,sled
A new child came to the class. "This is {F}," said the teacher. || One Monday, a new family moved into the
    house next door. They had a child named {F}.
{F} did not know anyone and spoke [another language|very quietly]. || Nobody talked to {F}, and {F.he}
    stood [alone|by the wall] at every break.
Some children [whispered|giggled|stared], but {H} remembered how it feels to be new. || {H} watched for a
    while. "That must be hard," {he} thought.
So {H} walked over with {his} {T} and [pointed|smiled]. || {H} took {his} {T} and sat down next to {F}.
"Do you want to play with my {T}?" asked {H}. || {He} did not say much. {He} just [showed|handed] {F} the {T}.
{F} [looked up|blinked] in surprise and then smiled for the first time. || At first {F} [hesitated|shook
    <F.his> head], but then {F.he} took it.
? {F} taught {him} a word that meant friend.
Soon {F} showed {him} a trick with the {T} that nobody knew. Now all the children came to watch. || By the
    end of the [week|day], {F} was part of every game.
Q Who was new? = {F} was new.
Q What did they play with? = They played with the {T}.

# lost_pet: H F A V P
One day, the {A} of {H} ran away. Its name was {V}. || {H} had {a A} called {V}. One morning, the gate
    stood open, and {V} was gone.
{H} [called|shouted] the name until {he} was [hoarse|tired]. || "{V}! Where are you?" {H} called through
    all the streets.
{F} helped {him} to [draw|write] [posters|signs] and hang them on every [tree|fence]. || "Do not cry,"
    said {F}. "We will ask everybody we meet."
They asked the [postman|baker|butcher], but no one had seen {a A}. || An old [lady|man] had heard
    something near the {P}.
At the {P} they found [tracks|paw marks] in the mud. || They went to the {P} and [listened|looked around].
There was {V}, [sitting in a barrel|stuck in a fence|asleep under a cart]! || Then they heard a
    [faint|tiny] noise. {V} had fallen into a [ditch|hole] and could not get out.
? {H} could hardly believe {his} eyes.
{H} lifted {V} up and [pressed|hugged] the {A}. "Never do that again," {he} said. || Together, {H} and {F}
    pulled {V} out, and the {A} licked their hands.
Q What was the {A} called? = The {A} was called {V}.
Q Where did they find {V}? = They found {V} at the {P}.
Q Who helped {H}? = {F} helped {H}.

# school_play: H F C T=crown,mask,cape,horn,lamp,lantern,bell,trumpet
The class was getting ready for a play. {H} was to be the [king|dragon|wizard], with {a C} {T}. || In the
    school play, {H} had the biggest part and wore {a C} {T}.
{He} [learned|practiced] the words day and night. || {He} said the lines to the [mirror|cat|soup] until
    {he} knew them by heart.
On the great evening, the hall was full, and {H} felt {his} knees [shake|tremble]. || Then the
    [curtain|lights] went up, and {H} saw all the faces.
{He} opened {his} mouth, but every word was gone. || Not a [word|sound] would come out. It was
    [horribly|terribly] quiet.
Behind the [curtain|scenery], {F} saw what was wrong and whispered the first words. || {F}
    [crawled|slipped] onto the stage, dressed as a [tree|mouse], and whispered in {his} ear.
{H} took a deep breath and [went on|began], loud and clear. || At once {he} remembered everything.
? Even the [principal|mayor] wiped away a tear.
At the end, the [people|audience] [clapped|stamped] and threw flowers. {H} put the {C} {T} on the head of
    {F}. || {H} bowed, and then {he} pulled {F} to the front, because half of the applause belonged to
    {F.him}.
Q What did {H} wear? = {H} wore {a C} {T}.
Q Who helped {H} with the words? = {F} helped {H}.

# old_neighbor: H O K T=lamp,book,violin,clock,flute,horn,map,trumpet
In the last house of the street lived an old {O}, and all the children were afraid of him. || People said
    that the old {O} was [grumpy|mean] and had not laughed for years.
One day, the ball of {H} flew over his [hedge|wall]. || On a [dare|bet], {H} had to knock at his door.
{H} [swallowed|took all <his> courage] and knocked. The door [creaked|squeaked] open. || With a beating
    heart, {H} stepped into the yard.
"Are you hungry?" asked the {O}, and he put some {K} on the table. || But the old {O} was not angry. "At
    last a visitor!" he said, and he brought some {K}.
On the wall hung {a T}, and {H} asked about it. || "What is that {T}?" asked {H}.
"I got that {T} when I was your age," said the {O}, and he told a long story about [storms|kings|faraway
    lands]. || The {O} took the {T} into his hands and spoke of the days when he was young.
? Outside it grew dark, but neither of them noticed.
"May I come again?" asked {H}. The {O} laughed, and it sounded like a [rusty|creaky] gate. || When {H}
    left, the {O} pressed the {T} into {his} hand. "It needs someone young," he said.
Q What did the {O} bring? = The {O} brought some {K}.
Q What did {H} ask about? = {H} asked about the {T}.

# market: H G N T U
One [Friday|Thursday], {his} {G} sent {H} to the market with {N} coins. || "Go and buy {a T}," said {his}
    {G}, and {G.he} gave {H} {N} coins.
"Come straight back with {a T}," said {his} {G}. || {H} held the {N} coins [tightly|firmly] and walked off
    to get {a T}.
The market was [loud|crowded] and [colorful|smelled of fish and spices]. || At the stalls there were
    [carpets|cheeses|caged birds], and a [juggler|puppet show] in the middle.
A man held up {a U}. "Only {N} coins!" he [bellowed|cried]. || Then {H} saw {a U}. It was so pretty that
    {he} forgot everything else.
{H} wanted the {U} very much. {He} had the money in {his} hand. || "If I buy the {U}, I cannot buy the
    {T}," thought {H}.
But {he} had promised. {He} [sighed|shook <his> head] and went on. || {He} walked around the stall
    [twice|three times], and then {he} went away.
{H} bought the {T} and carried it home. || For {N} coins {H} got a fine {T}.
"I knew that I could trust you," said {his} {G}, and out of a bag {G.he} took {a U}. || When {his} {G}
    heard about the {U}, {G.he} smiled. "A promise kept is worth more," {G.he} said.
Q What did {H} buy? = {H} bought the {T}.
Q How many coins did {H} have? = {H} had {N} coins.

# race: H F P
Every autumn, there was a [great|big] race around the {P}. || "Whoever is first at the {P} wins," said {F}.
{F} was the fastest runner of all and [bragged|boasted] about it. || "You are a snail, {H}," laughed {F}.
    "I shall win easily."
{H} had short legs, but {he} [trained|practiced] every morning before breakfast. || {H} said nothing and
    tied {his} shoes.
The race began. {F} shot ahead like an arrow and was soon [out of sight|far in front]. || Off they went!
    {F} was ahead from the first step.
{H} ran slowly and steadily, past the [windmill|church] and over the [bridge|field]. || {H} found {his}
    own [speed|rhythm] and did not look left or right.
Halfway there, {F} stopped to [rest|drink|pick cherries] and [dozed|nodded] off. || But {F} had started
    too fast and soon had a [stitch|pain] in {F.his} side.
? A tortoise in the ditch seemed to [nod|wink].
When {F} woke up, {H} was already crossing the line. || {H} [passed|overtook] {F} just before the end.
    "Take my hand," {he} said, and they finished together.
Q Who bragged? = {F} bragged.
Q Where was the race? = The race was at the {P}.

# helping_birds: H B=sparrow,robin,owl,crow,heron,swan G
In a [fierce|terrible] storm, a nest fell from the [elm|birch|chestnut tree]. || After the storm, {H}
    found a nest on the ground.
In it sat a [young|baby] {B} without [feathers|a mother]. || A baby {B} lay beside it and opened its
    [beak|mouth].
"What does it eat?" asked {H}. "[Worms|Flies|Insects]," said {his} {G}, "and lots of them." || {His} {G}
    brought a [lamp|hot bottle] to keep it warm.
So every hour, {H} fed the little {B}, even [before school|at midnight]. || {H} dug for worms until {his}
    fingernails were black.
The {B} grew and grew, and soon it [fluttered|flapped] through the kitchen. || After three weeks, it had
    real wings and [perched|sat] on the lamp.
"It must learn to be free," said {his} {G}. {H} knew that it was true, but it [hurt|was hard]. || One
    morning, {H} opened the window wide.
The {B} flew [in a circle|once around the house] and [rose|soared] into the sky. || For a moment the {B}
    sat on the [sill|ledge], and then it spread its wings.
? {H} waved until it was only a dot.
In the next spring, {a B} built a nest above the door. "Welcome back," said {H}. || Sometimes a feather
    lay on the [windowsill|step], and {H} knew from whom it was.
Q What bird did {H} feed? = {H} fed {a B}.
Q Who helped {H}? = {His} {G} helped {H}.

# music: H O=musician,painter,shepherd,baker,sailor F T=drum,flute,violin,trumpet,horn,bell
One day, a traveling {O} came to town and played {a T}. || On the square sat {a O} with {a T}.
{H} had never heard anything so [beautiful|lovely]. {He} stood still and forgot the time. || The music
    made the [grandmothers|dogs|washerwomen] dance, and {H} danced too.
"Can you teach me?" asked {H}. || {H} came back every day and listened, until the {O} [beckoned|waved] to
    {him}.
"It takes [time|practice]," said the {O} and put the {T} into {his} hands. || The {O} showed {him} where
    to put the fingers.
The first sound was [dreadful|a croak]. {F} covered {F.his} ears and laughed. || "It sounds like a sick
    cow," said {F}.
But {H} [practiced|played] on, behind the house and in the stable. || {H} was [hurt|cross] for an hour,
    but then {he} tried again, and again.
? The hens stopped laying, and even the pig complained.
In the end, {he} played the {T} at the [harvest|summer] feast. "I take it all back," said {F}. || One
    evening, a [melody|song] floated over the roofs, and {F} asked, "Who is playing so well?" It was {H}
    with the {T}.
Q What did {H} learn to play? = {H} learned to play the {T}.
Q Who laughed at {H}? = {F} laughed at {H}.

# cat_rescue: H F O=fisherman,farmer,gardener,painter,carpenter,doctor V
From the roof of the [church|bakery|tower] came a [pitiful|thin] meow. || A crowd stood in the street and
    looked up. On the chimney sat a cat.
"That is {V}, the cat of the {O}," said {F}. || It was {V}, who belonged to the {O}.
{H} [offered|held up] a bit of fish, but {V} only [hissed|meowed]. || "Here, {V}, come!" they called, but
    the cat did not dare to move.
"We need a ladder," said {F}. The longest one was too short. || {F} tried to climb the [drainpipe|ivy] but
    slid down again.
Then {H} had an idea. {He} [tied|fastened] a basket to a long rope. || {H} thought and thought. "A basket
    on a pole!" {he} said.
They [hoisted|lifted] the basket up to the edge. {V} [sniffed|looked] at it and jumped in. || {F} held the
    rope, and {H} [guided|steered] the basket, until {V} climbed inside.
? Everyone held their breath.
The {O} took {V} in his arms and had tears in his eyes. "How can I thank you?" he asked. || "You are
    clever children," said the {O}. He gave {H} and {F} a ride in his cart.
Q What was the cat called? = The cat was called {V}.
Q Whose cat was it? = It was the cat of the {O}.

# birthday: H F C
    T=ball,kite,drum,book,doll,boat,bell,lamp,map,scarf,puzzle,wagon,sled,train,truck,robot,violin,flute N
Tomorrow was the birthday of {F}, and {H} had no present. || {F} was going to be {N} years old, and {H}
    was invited to the party.
{H} [emptied|opened] {his} piggy bank, but there were only {N} coins in it. || {He} looked in the shop,
    but everything was too [expensive|dear].
"Then I will make something," {H} decided. || "The best gifts are made by hand," thought {H}.
{He} took {his} own old {T}, [scrubbed|sanded|mended] it and painted it {C}. || Out of
    [cardboard|wood|cloth] {he} made {a C} {T}, and it took all night.
At the party, the others brought [big|glittering] [parcels|presents]. {H} felt small. || The table was
    full of expensive things. {H} hid {his} gift behind {his} back.
"And what is that?" asked {F}. Slowly, {H} held out the {C} {T}. || {F} [unwrapped|opened] the {C} {T} and
    said nothing for a long time.
? The candles on the cake [flickered|glowed].
"You made it yourself?" said {F}. "This is the one I will keep forever." || And {F} put the {C} {T} in the
    [middle|center] of the table, where all could see it.
Q Whose birthday was it? = It was the birthday of {F}.
Q What did {H} give to {F}? = {H} gave {F} {a C} {T}.
Q What color was the {T}? = The {T} was {C}.

# wolf_joke: H B=bear,fox,badger G
{H} looked after the sheep of {his} {G} and found it [boring|dull]. || Up on the meadow, {H} guarded the
    goats for {his} {G}, and the days were long.
"A {B}! A {B}!" {he} shouted one day for fun. || To [pass the time|have some fun], {he} cried, "Help! A
    {B} is coming!"
All the [neighbors|villagers] came running with [sticks|forks], and {H} laughed. || {His} {G}
    [dropped|left] the soup and ran up the hill. But there was no {B}.
"Do not joke about such things," said {his} {G}. || The people went home and [grumbled|shook their heads].
A week later, a real {B} came out of the forest. || Then, one evening, a real {B} stood among the animals.
{H} called and called, but [nobody|no one] believed {him}. || "Help!" shouted {H}. "It is only a joke
    again," said the people.
{H} had to [chase|drive] the {B} away alone, by banging on a [pot|bucket], and {he} [shook|trembled] for
    hours. || In the end, the {B} took a [loaf|sausage] and left, but {H} had never been so frightened.
"I will never cry for nothing again," {H} promised {his} {G}. || {His} {G} put an arm around {him}. "Words
    are like coins," {G.he} said. "Do not waste them."
Q What animal came? = The animal was {a B}.
Q Who told {H} not to joke? = {His} {G} told {H} not to joke.
"""
