"""Plots at home, in the kitchen and in the workshop (the format is described in world.py)."""

TEXT = """
# baking: H G K=bread,cake,soup,pie,porridge,pudding,cookies,pancakes,muffins,waffles N
One [Saturday|Sunday|rainy day], {H} wanted to surprise {his} {G} with some {K}. || It was the birthday of
    {his} {G}, and {H} decided to make some {K}.
{He} [read|opened] the [recipe|cookbook] and took {N} [eggs|cups of flour|spoons of sugar] from the
    [cupboard|shelf]. || The recipe asked for {N} [eggs|cups of milk], and {H} put them into a [big|round]
    bowl.
{H} [stirred|mixed|beat] until {his} arms [ached|hurt]. || Flour [flew|dusted] everywhere, even on {his} nose.
But {he} forgot to look at the oven, and [smoke|a burnt smell] filled the kitchen. || Then {he} noticed
    that {he} had used salt instead of sugar. It tasted [awful|terrible]!
"What happened here?" asked {his} {G}. {H} began to [cry|sniff]. "I wanted to make {K} for you." || {His}
    {G} came in and saw the mess. "I spoiled it," [sobbed|said] {H}.
"Nobody is born a [cook|baker]," said {his} {G}. "Come, we shall try again together." || {G.He}
    [smiled|laughed] and tied on an apron. "The second time is always better," {G.he} said.
? They [hummed|sang] while they worked, and the kettle [whistled|steamed] along.
Soon the house smelled of {K}, and they sat down to eat while it was still [warm|hot]. || This time,
    nothing went wrong. The {K} tasted [wonderful|perfect|like a dream]. They ate until they were full.
Q What did {H} want to make? = {H} wanted to make some {K}.
Q Whom did {H} want to surprise? = {H} wanted to surprise {his} {G}.

# broken_thing: H G
    T=drum,cup,doll,bell,lamp,flute,mirror,clock,umbrella,lantern,compass,trumpet,jar,bottle,necklace,crown,mask,robot,train,violin,fan
One afternoon, {H} was [running|playing|jumping] in the [hall|kitchen|living room], although it was not
    allowed. || One day, {H} was alone in the room with the {T} that belonged to {his} {G}.
[Crash|Crack|Bang]! The {T} of {his} {G} [fell|dropped] and broke. || {He} only wanted to [touch|hold] the
    {T}, but it [slipped|slid] from {his} fingers and broke.
{H} [hid|pushed] the pieces under the [carpet|sofa|cupboard]. || "Nobody saw it," thought {H}, and {he}
    [covered|hid] the {T} with a [cloth|towel|cushion].
At supper, {he} could not [eat|swallow] a bite. {His} [stomach|heart] felt [heavy|like a stone]. || All
    evening {he} was [silent|pale]. The secret [weighed|pressed] on {him}.
"I broke your {T}," {he} said at last. "I am so sorry." || Finally {H} went to {his} {G} and told the
    truth. "The {T} is broken, and I did it," {he} said.
{His} {G} was quiet for a moment. "The {T} can be mended," {G.he} said. "I am glad that you were honest." ||
    "Thank you for telling me," said {his} {G}. "The truth is worth more than any {T}."
? {H} felt as light as a [feather|cloud|bubble].
They [glued|fixed|repaired] the {T} together, and only a thin [line|crack] remained. || Together they
    mended the {T}, and it was [almost|nearly] as good as new.
Q What did {H} break? = {H} broke the {T}.
Q Whose {T} was it? = It belonged to {his} {G}.

# afraid_of_dark: H G T=lamp,lantern,candle,blanket,pillow,doll,bell
Every night, when the light went out, {H} was afraid. || {H} had a secret. {He} was scared of the dark.
The [curtain|wardrobe|chair] looked like a [monster|dragon|giant], and the floor [creaked|groaned]. ||
    Strange [shapes|shadows] crept over the [wall|ceiling], and something [tapped|scratched] at the
    window.
"Is there something under my bed?" asked {H}. || {He} pulled the covers over {his} head and called for
    {his} {G}.
{His} {G} [came|hurried] in and sat on the edge of the bed. "Let us look together," {G.he} said. || "When
    I was little, I was afraid too," said {his} {G}.
They looked, and there was only [a sock|dust|an old slipper|a cat]. || The monster was only a coat on a
    [hook|nail], and the tapping was only a [twig|branch].
Then {his} {G} gave {him} {a T}. "Keep it beside you," {G.he} said. "It has kept me company for years." ||
    From a [drawer|trunk], {his} {G} took {a T}. "This {T} helped me when I was small," {G.he} said.
? Outside, an owl called, but now it sounded [friendly|soft].
With the {T} beside {him}, {H} [counted|listened to] the stars and was not afraid. || {H} held the {T}
    close, and the dark felt [soft|quiet|gentle].
Q What did {his} {G} give to {H}? = {His} {G} gave {H} {a T}.
Q What was {H} afraid of? = {H} was afraid of the dark.

# new_pet: H A V G
For a long time, {H} had [wanted|wished for] {a A}. || "May I have {a A}?" {H} asked [every day|every
    week|again and again].
"A pet needs [care|food and love] every day," said {his} {G}. "Can you promise that?" || {His} {G} shook
    {G.his} head. "First show me that you can be [careful|responsible]."
So {H} [washed the dishes|swept the floor|fed the chickens|tidied the room] for a whole month. || {H}
    [helped|worked] every day without being asked.
On {his} birthday, there was a [basket|box] with [holes|a ribbon] on the table. Something inside
    [squeaked|scratched|wriggled]. || One morning, {his} {G} came home with [a basket|a cage|something]
    under {G.his} arm.
It was {a A}! "I will call you {V}," said {H}. || Out came {a A} with [bright|shiny|round] eyes. {H} named
    it {V}.
That night, {V} [cried|could not sleep], so {H} [stayed up|sat beside the basket] and [stroked|petted] its
    back. || At first {V} was shy and hid behind the [stove|sofa]. {H} waited until it came out.
? {V} ate [quickly|noisily|everything] and then [yawned|fell asleep].
{H} fed {V} every morning and never forgot. || "You kept your promise," said {his} {G}, and {V}
    [agreed|made a happy sound].
Q What pet did {H} get? = {H} got {a A}.
Q What was the pet called? = The {A} was called {V}.

# sick_friend: H F K T=book,puzzle,drum,flute,kite,doll,marble,pencil,crayon
One Monday, {F} was not at school. {F.He} was in bed with a [fever|cold|cough]. || One week, {F} was ill
    and had to stay in bed.
{H} [missed|thought of] {F} all day. || "Poor {F}," thought {H}. "It must be [dull|boring|lonely] in bed."
So {he} packed some {K} and {a T} and [knocked|rang] at the door. || After school, {H} went to see {F} and
    brought some {K} and {a T}.
"Only for a [short|little] while," said the [doctor|nurse]. {F} looked [weak|pale], but {F.he} smiled. ||
    {F} lay under [three|thick] blankets, with a red nose.
They ate the {K} and [played|laughed] with the {T}. || The {T} made {F} laugh so much that the bed shook.
    Then they shared the {K}.
? {H} told all the news from school, even [the silly parts|about the mouse in the classroom].
"I feel better already," said {F}. "You are the best [medicine|cure]." || A few days later, {F} was
    [well|healthy] again.
"You may keep the {T}," said {H}. || {F} gave the {T} back, wrapped in paper, with a [note|drawing] that
    said thank you.
Q Who was ill? = {F} was ill.
Q What did {H} bring to play with? = {H} brought {a T}.

# cleaning_up: H G T U
The room of {H} was a terrible mess. [Socks|Books|Toys] lay everywhere. || "Please tidy your room," said
    {his} {G}. But {H} did not feel like it.
"Later," said {H}, and {he} went on playing. || {He} pushed everything under the bed and [thought|hoped]
    that no one would notice.
The next day, {H} wanted {his} {T}. It was nowhere to be seen. || Then came the day of the fair, and {H}
    needed {his} {T}.
{He} [threw|tossed] [shirts|papers|blocks] left and right, but there was no {T}. || {He} looked in every
    [drawer|corner|box], but the {T} was lost in the mess.
"Now I see why tidy rooms are good," [sighed|groaned] {H}. || {His} {G} [raised|lifted] an eyebrow and
    said nothing at all.
So {H} [folded|sorted|picked up] one thing after another. Behind the bed {he} found {his} old {U}. || {H}
    started in one corner. First {he} found {his} {U}, which had been missing for [months|weeks].
? It took two hours, and {he} found [seven|eight|nine] [socks|pencils|coins] too.
And at the very bottom lay the {T}! "From now on, every thing has its place," said {H}. || At last {he}
    [discovered|saw] the {T}, right under {his} own pillow.
Q What was {H} looking for? = {H} was looking for {his} {T}.
Q What did {H} find first? = {H} found {his} {U} first.

# picture: H G C T=boat,train,lamp,crown,drum,boot,kite,robot,umbrella,truck,wagon
One rainy day, {H} [sat|stood] at the window and was [bored|gloomy]. || It was raining, and {H} had
    nothing to do.
"Why do you not [paint|draw] something?" asked {his} {G}. || {His} {G} put a [sheet|roll] of paper and
    some [paints|brushes] on the table.
{H} painted {a T}, but the only paint left was {C}. || {H} began to paint {a T}. {He} made it {C} from top
    to bottom.
"Whoever saw {a C} {T}?" asked {his} brother and laughed. || Some [paint|water] [dripped|spilled] on it,
    and a big {C} [spot|blot] spread over the {T}.
{H} almost [tore|crumpled] the picture. "It is ugly," {he} said. || Tears came into {his} eyes. "Now it is
    ruined," said {H}.
"Wait," said {his} {G}. "I have never seen a [finer|better] {T}. It looks like {a T} from a dream." ||
    "Look again," said {his} {G}. "Mistakes are where ideas begin."
? So {H} added a [moon|sun|cloud|dragon] and a few [birds|stars|fish].
They hung the {C} {T} in the [hall|kitchen], and every [guest|visitor] admired it. || The picture of the
    {C} {T} won a prize at [school|the fair].
Q What did {H} paint? = {H} painted {a T}.
Q What color was the {T}? = The {T} was {C}.

# clock_shop: H O=clockmaker,carpenter,tailor,painter,baker,teacher,miller,musician
    T=clock,violin,lamp,bell,trumpet,flute,robot,train
On the corner lived an old {O}. {H} [liked|loved] to watch through the window. || Every day on the way
    from school, {H} stopped at the house of the {O}.
One day, the {O} looked [worried|unhappy]. "My {T} has stopped [working|making a sound]," said the {O}. ||
    "Can you help me, child?" asked the {O}. "My eyes are [old|weak], and my {T} is broken."
{H} looked [closely|carefully] at the {T}. Something tiny was [stuck|hidden] inside. || {H} [shook|turned]
    the {T} and heard a [rattle|faint click].
With a [pin|needle|pair of tweezers], {he} pulled out a [seed|crumb|dead moth|bit of fluff]. || {His}
    small fingers could reach where no tool could. {He} pulled out a [grain of sand|tangled thread].
? "Gently, gently," [murmured|muttered] the {O}.
And the {T} worked again! The {O} [clapped|danced] for joy. || All at once, the {T} [came|sprang] to life.
"Would you like to be my [helper|apprentice]?" asked the {O}. {H} [nodded|said yes] at once. || The {O}
    gave {H} a [golden|silver|shiny] [coin|medal] and a promise to teach {him} everything.
Q What was broken? = The {T} was broken.
Q Whose {T} was it? = It was the {T} of the {O}.

# bedtime: H G A V
"Time for bed," said {his} {G}. But {H} was not tired. || It was late, but {H} did not want to go to sleep.
"I need a glass of water," said {H}. Then {he} needed [a kiss|a song|another pillow]. || First {he} wanted
    water, then {a A} to [cuddle|hug], and then a story.
"One story, and then you close your eyes," said {his} {G}. || {His} {G} [sighed|smiled] and sat down in
    the [rocking|old] chair.
"There was {a A} called {V}," {G.he} began. "{V} was awake when the whole world slept." || {G.He} told
    {him} about {a A} named {V} who wanted to stay awake for [ever|a hundred years].
"{V} [walked|wandered] through the [silent|empty] streets, but there was no one to play with." || "What
    did {V} see?" asked {H}. "Only the moon, and the moon does not talk," said {his} {G}.
"So {V} [yawned|curled up] and went home, because the best games are played by day." || "And then {V} was
    so tired that it fell asleep standing up."
? The voice of {his} {G} grew [softer|slower|quieter].
"Is that the end?" {H} wanted to ask, but {his} eyes were already shut. || When the story ended, {H} was
    [snoring|breathing] softly.
Q Who told {H} a story? = {His} {G} told {H} a story.
Q What was the {A} in the story called? = The {A} was called {V}.

# lost_tooth: H G N
One morning at breakfast, {H} [felt|noticed] that a tooth was [loose|wobbly]. || {H} bit into an apple.
    "Ow! My tooth moves!" {he} said.
{He} wiggled it with {his} tongue for {N} days. || For {N} days, the tooth [hung|held on] by a thread.
"Shall I pull it?" asked {his} {G}. "No!" cried {H} and ran away. || {His} {G} offered to tie it to the
    [door|doorknob], but {H} was too scared.
Then, in the middle of a [laugh|sneeze|song], the tooth [popped|flew] out. || While {he} was [playing
    football|eating corn|brushing <his> teeth], out it came.
? It had not hurt at all.
{H} looked into the glass and grinned. There was a [window|gap|hole] in {his} smile. || "Look, I can
    [whistle|spit] through it!" said {H} to {his} {G}.
At night {he} laid the tooth under {his} pillow. In the morning, {N} coins lay there. || {His} {G} put it
    in a tiny box. "You are growing up," {G.he} said.
Q How long did the tooth wobble? = It wobbled for {N} days.

# night_noise: H A V F
[Tap, tap, tap|Bump, bump, bump]! In the middle of the night, a noise woke {H}. || One night, {H} woke up
    because something [thumped|clattered] downstairs.
{He} [shook|woke] {F}, who was staying for the night. "Did you hear that?" || "It is a [ghost|burglar]!"
    whispered {F}, who was visiting for the weekend.
They tiptoed down the [stairs|steps] with a [broom|torch|frying pan]. || Holding hands, {H} and {F} crept
    along the [dark|cold] corridor.
The noise came from the [kitchen|cellar|pantry]. Slowly {H} opened the door. || There it was again! {F}
    [gulped|squeezed] {his} hand.
Two green eyes [glowed|shone] in the dark. Then something [meowed|sneezed|sniffed]. || {H} switched on the
    light. They both [screamed|gasped], and then they [giggled|burst out laughing].
It was only {V}, the {A}, with its head stuck in a [milk can|cookie jar|flower pot]. || {V} the {A} sat in
    the flour and looked [guilty|very pleased].
? "Some ghost!" laughed {F}.
They freed {V} and gave the {A} a [bowl of milk|late supper|gentle scolding]. || {H} cleaned the {A}, and
    {F} cleaned the floor.
Q Who made the noise? = {V} the {A} made the noise.
Q Who was staying with {H}? = {F} was staying with {H}.

# letter: H G P T=stamp,shell,feather,ribbon,whistle,compass,button,flute
{His} {G} lived far away, near the {P}, and {H} missed {G.him}. || The {G} of {H} had [sailed|moved] to a
    house by the {P}, many miles away.
So {H} [wrote|began] a long letter. {He} told about [school|the cat], the [weather|neighbors] and the
    [loose tooth|new bicycle]. || One Sunday, {H} took a pen and [ink|paper] and wrote a letter.
In the [envelope|packet] {he} also put {a T}. || {He} added a drawing and {a T}, so that {G.he} would
    [smile|remember <him>].
{H} [dropped|pushed] it into the mailbox and waited. One week, two weeks, three weeks. || The postman
    [came and went|shook his head] every day. "Nothing for you," he said.
? "Perhaps the letter got wet," thought {H}.
Then there was a knock. It was not the postman. It was {his} {G}! || One morning, the bell rang, and there
    stood {his} {G} with a [suitcase|trunk].
"I got your {T}," said {his} {G}, "and I wanted to bring the answer myself." || "I carry your {T} with me
    always," said {his} {G}, and {G.he} [lifted|hugged] {H} high into the air.
Q What did {H} put in the letter? = {H} put {a T} in the letter.
Q Where did {his} {G} live? = {His} {G} lived near the {P}.
"""
