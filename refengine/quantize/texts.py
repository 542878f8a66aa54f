"""Stories on which a quantized copy is evaluated, made by tools/write/quantize_texts.py: do not edit."""

from __future__ import annotations

BETWEEN = "\n\n----\n\n"  # two stories


def unwrapped(story: str) -> str:
    """Return a story with each of its paragraphs on one line."""
    return "\n\n".join(" ".join(part.splitlines()) for part in story.split("\n\n"))


STORIES = """
Once upon a time, there was a lively boy named Max. He lived with his family in a cottage with a red
roof. The sun was shining, and the sky was clear.

One morning, he was walking near the beach when he heard a small sound. It was a beaver with a hurt
foot. Max knelt down. "Do not be afraid, little beaver," he said. He wrapped the beaver in his
sweater and took it to his grandmother. "You did well," said his grandmother. Together they made a
warm bed of straw in a box. Every evening, Max brought the beaver water and bread. Day by day, the
beaver grew stronger. So Max carried the beaver back to the beach and opened his arms. The beaver
looked at him for a long time and then slipped away among the trees.

From that day on, Max was very happy.

----

Long ago, in a land of hills, there lived a bold boy named Ivan.

One bright morning, Ivan went to the hill with his new pink cape. All at once, the cape flew up and
up, until it hung in the top of an oak. Ivan hopped as high as he could, but the branch was too
high. Then Wren came along with a fishing rod. "May I try?" asked Wren. Wren poked and pulled, and
at last the cape came down. Ivan caught the cape with both hands. "You are as quick as a squirrel,
Wren!" said Ivan.

On the way home, Ivan and Wren held hands.

----

Sara was a little girl, and everyone said that she was friendly.

In the night it had snowed. "Let us make a snowman!" said Sara to Lily. Somewhere a dog barked. Sara
rolled a round ball for the body, and Lily made the head. They used chestnuts for eyes and a carrot
for the nose. "Something is missing," said Lily. So Sara brought a spoon that was white and gave it
to the snowman. That evening, frost painted stars on the window. A few days later, the sun shone
warm, and the snowman shrank. "He will come again next winter," said Lily, and Sara kept the white
spoon for him.

That night, Sara fell asleep with a smile.

----

Long ago, in a town by the sea, there lived a lively girl named Lily.

One rainy day, Lily stood at the window and was gloomy. "Why do you not paint something?" asked her
aunt. Lily began to paint an umbrella. She made it white from top to bottom. Some paint spilled on
it, and a big white blot spread over the umbrella. Tears came into her eyes. "Now it is ruined,"
said Lily. "Wait," said her aunt. "I have never seen a finer umbrella. It looks like an umbrella
from a dream." So Lily added a cloud and a few fish. The picture of the white umbrella won a prize
at the fair.

Lily had learned that telling the truth is best.

----

There was once a busy girl called Kate.

Kate bit into an apple. "Ow! My tooth moves!" she said. For six days, the tooth held on by a thread.
"Shall I pull it?" asked her aunt. "No!" cried Kate and ran away. Then, in the middle of a laugh,
the tooth popped out. "Look, I can spit through it!" said Kate to her aunt. At night she laid the
tooth under her pillow. In the morning, six coins lay there.

That night the stars shone through the window, and Kate had a wonderful dream.

----

Wren was a thoughtful girl who lived in a busy town.

In the night it had snowed. "Let us make a snowman!" said Wren to Leo. The clock on the tower struck
nine. They rolled three heavy balls of snow and stacked them up. Leo helped Wren with the last one.
They used pebbles for eyes and a twig for the nose. Then Wren put a spoon on the snowman. It was
golden and looked splendid. That evening, frost drew stars on the window. A few days later, the sun
shone warm, and the snowman shrank. Only the golden spoon lay in the puddle. "Do not be sad," said
Leo. "He has gone back to the clouds."

And so the day ended happily, and Wren slept soundly.

----

Hugo was a playful boy who lived near the woods.

One day, Hugo was alone in the room with the clock that belonged to his mother. Far away, a bell
chimed. He only wanted to touch the clock, but it slipped from his fingers and broke. "Nobody saw
it," thought Hugo, and he hid the clock with a towel. At supper, he could not swallow a bite. His
stomach felt heavy. "I broke your clock," he said at last. "I am so sorry." His mother was quiet for
a moment. "The clock can be mended," she said. "I am glad that you were honest." Hugo felt as light
as a cloud. They repaired the clock together, and only a thin crack remained.

Hugo had learned that kind words help.

----

Once upon a time, there was a young girl named Maya.

There was only one feather at the farm, and two children wanted it, Maya and Leila. Maya pulled on
one side, and Leila pulled on the other. Neither would give in, and in the end both fell in the
dirt. Leila went home without a word. Maya had the feather now, but playing alone was dull. "I was
wrong," thought Maya. She wiped the feather and went to find Leila. "I am sorry," said Maya. "Me
too," said Leila. They shook hands solemnly and laughed about their muddy shoes. First Leila played
with the feather, then Maya, and then they invented a game for both.

In the evening, Maya told the long story at supper, and everyone listened.

----

There was once a shy boy called Bo. The sun was warm, and the sky was clear.

One day, he was walking near the garden when he heard a sad sound. There lay a raccoon that could
not walk. Its leg was hurt. Bo knelt down. "Do not be afraid, little raccoon," he said. He wrapped
the raccoon in his coat and took it to his aunt. His aunt cleaned the wound and put a soft bandage
on it. Day by day, the raccoon grew stronger. At last they let the raccoon go near the garden. It
turned its head, as if to say thank you.

That night the moon shone through the window, and Bo felt safe and warm.

----

There was once a friendly boy called Finn. It was a cool day, and the street seemed to be waiting
for something.

"Go and buy a purse," said his aunt, and she gave Finn three coins. Finn held the three coins firmly
and walked off to get a purse. The market was loud and smelled of fish and spices. Then Finn saw a
clock. It was so pretty that he forgot everything else. Finn wanted the clock very much. He had the
money in his hand. He walked around the stall three times, and then he went away. Finn bought the
purse and carried it home. "I knew that I could trust you," said his aunt, and out of a bag she took
a clock.

And Finn never forgot that strange day.

----

There was once a stubborn boy called Bo.

On the corner lived an old tailor. Bo loved to watch through the window. "Can you help me, child?"
asked the tailor. "My eyes are weak, and my lamp is broken." Bo looked closely at the lamp.
Something tiny was stuck inside. With a pin, he pulled out a bit of fluff. "Gently, gently,"
murmured the tailor. And the lamp worked again! The tailor danced for joy. The tailor gave Bo a
golden medal and a promise to teach him everything.

From that day on, Bo was proud and happy.

----

Ivy was a curious girl who lived on a long street.

People said that the old carpenter was mean and had not laughed for years. One day, the ball of Ivy
flew over his wall. With a beating heart, Ivy stepped into the yard. "Are you hungry?" asked the
carpenter, and he put some plums on the table. On the wall hung a flute, and Ivy asked about it. The
carpenter took the flute into his hands and spoke of the days when he was young. Outside it grew
dark, but neither of them noticed. "May I come again?" asked Ivy. The carpenter laughed, and it
sounded like a rusty gate.

From that day on, Ivy was happy.

----

Once upon a time, there was a young boy named Paul. The wind was gentle, and small clouds sailed
over the roofs.

The class was getting ready for a play. Paul was to be the dragon, with a silver lamp. He said the
lines to the cat until he knew them by heart. Then the curtain went up, and Paul saw all the faces.
Not a word would come out. It was terribly quiet. Behind the scenery, Ivan saw what was wrong and
whispered the first words. Paul took a deep breath and began, loud and clear. Paul bowed, and then
he pulled Ivan to the front, because half of the applause belonged to him.

In the evening, Paul told the whole story at dinner, and everyone smiled.

----

Luke was a young boy, and everyone said that he was cheerful.

Near the meadow stood a row of beehives, and Luke looked after the bees. One night, a fox came
creeping to steal the honey. The bees were angry and swarmed around its ears. "Ouch!" howled the
fox. Luke came running with cold water. "Hold still," he said. "This will stop the pain." "Why do
you not ask before you take?" said Luke. The fox hung its head. The bees listened on the clover and
grew quiet. From then on, the fox protected the bees, and they gave it honey of their own free will.

In the evening, Luke told the long story at home, and everyone smiled.

----

There once was a girl called Pia who was very lively.

Tomorrow was the birthday of Emma, and Pia had no present. Pia hummed a little tune. She looked in
the shop, but everything was too expensive. "Then I will make something," Pia decided. She took her
own old book, scrubbed it and painted it red. At the party, the others brought glittering presents.
Pia felt small. "And what is that?" asked Emma. Slowly, Pia held out the red book. And Emma put the
red book in the center of the table, where all could see it.

In the evening, Pia told the funny story at home, and everyone listened.

----

Once upon a time, a stubborn girl named Ruby lived near a river. Ruby was a stubborn child and
everyone liked her.

One day, the pony of Ruby ran away. Its name was Socks. Ruby shouted the name until she was tired.
"Do not cry," said Ravi. "We will ask everybody we meet." An old lady had heard something near the
river. They went to the river and looked around. Then they heard a tiny noise. Socks had fallen into
a ditch and could not get out. Together, Ruby and Ravi pulled Socks out, and the pony licked their
hands.

That night the stars shone through the window, and Ruby had a wonderful dream.

----

Clara was a young girl, and everyone said that she was playful.

One day, Clara was alone in the room with the train that belonged to her aunt. Far away, a bell
chimed. Crash! The train of her aunt dropped and broke. Clara hid the pieces under the carpet. All
evening she was pale. The secret weighed on her. "I broke your train," she said at last. "I am so
sorry." "Thank you for telling me," said her aunt. "The truth is worth more than any train." Clara
felt as light as a cloud. They fixed the train together, and only a thin line remained.

That night, Clara fell asleep with a smile.

----

Once upon a time, there was a little boy named Otto. The wind was strong, and white clouds sailed
over the roofs.

One day, on the path to the castle, something moved in the bushes. It was an owl with a hurt leg.
Otto knelt down. "Do not be afraid, little owl," he said. He carried the owl in his coat and took it
to his grandmother. His grandmother cleaned the wound and put a clean bandage on it. Every morning,
Otto brought the owl fresh water. Day by day, the owl grew stronger. So Otto carried the owl back to
the castle and opened his arms. The owl looked at him for a long time and then slipped away among
the trees.

What a wonderful day it had been!

----

Once upon a time, a cheerful girl named Rosa lived in a tall house. Rosa was a cheerful child and
all the neighbors knew her.

Her grandmother lived far away, near the museum, and Rosa missed her. One Sunday, Rosa took a pen
and paper and wrote a letter. In the envelope she also put a ribbon. The postman shook his head
every day. "Nothing for you," he said. "Perhaps the letter got wet," thought Rosa. One morning, the
bell rang, and there stood her grandmother with a suitcase. "I carry your ribbon with me always,"
said her grandmother, and she hugged Rosa high into the air.

Rosa had learned that friends help each other.

----

There once was a girl called Pia who was very lively.

On the square sat a shepherd with a drum. Pia had never heard anything so lovely. She stood still
and forgot the time. Pia came back every day and listened, until the shepherd beckoned to her. "It
takes time," said the shepherd and put the drum into her hands. "It sounds like a sick cow," said
Jack. Pia was cross for an hour, but then she tried again, and again. The hens stopped laying, and
even the pig complained. In the end, she played the drum at the summer feast. "I take it all back,"
said Jack.

It was the best day of all.
"""
TEXTS = tuple(unwrapped(story) for story in STORIES.strip().split(BETWEEN))
