"""The fixed text that quality is measured on: plain prose, a table, code, numbers and dialogue,
written for this purpose, so that results of different days compare."""

TEXT = """\
The lock keeper's house stands where the canal leaves the river. Every morning at six, before the
barges come, he walks along the towpath with a lantern and reads the height of the water from a
brass rule that is screwed to the wall. He writes the figure in a notebook, together with the wind
and the temperature of the air, and when the notebook is full he carries it to the town hall, where
nobody has opened one for thirty years.

"Why do you still do it?" his niece asked him one summer.

"Because on the day that somebody asks," he said, "the answer must already be there. You cannot
measure the water of last year."

She thought about that on the train home. She was a student of engineering, and had been taught
that a measurement is worth what it costs only if it can change a decision. But she had also seen a
bridge fail in a laboratory, because the one sensor that mattered had been left out to save eleven
euros.

A heat engine takes energy from something hot, turns a part of it into work, and gives the rest to
something cold. The share that can become work depends on the two temperatures alone: with a boiler
at 500 kelvin and a river at 300 kelvin, at most 1 - 300/500 = 40 percent. No choice of metal, gas
or oil can raise it. What good engineering does is to come near the limit: real turbines reach about
three quarters of it.

| city      | height (m) | rain (mm) | days of frost |
|-----------|------------|-----------|---------------|
| Lisbon    | 2          | 691       | 0             |
| Bern      | 542        | 1059      | 103           |
| Quito     | 2850       | 1015      | 0             |
| Reykjavik | 15         | 798       | 117           |

def moving_average(values, width):
    # Return the mean of each window of the given width.
    if width < 1:
        raise ValueError("width must be at least 1")
    total = sum(values[:width])
    means = [total / width]
    for index in range(width, len(values)):
        total += values[index] - values[index - width]
        means.append(total / width)
    return means

To make bread for four people, mix 500 grams of flour with 350 millilitres of warm water, a spoon of
salt and a little yeast. Knead it for ten minutes, until it is smooth and no longer sticks to the
table. Cover the bowl with a cloth and wait two hours. Then shape a loaf, let it rest while the
oven heats to 230 degrees, cut the top with a sharp knife, and bake it for thirty-five minutes. It
is done when it sounds hollow if you knock on its base.

The first clocks that could keep time at sea were built by a carpenter. Before him, a captain knew
how far north he was from the height of the sun, but how far east he could only guess, and whole
fleets were lost on rocks that were thought to be a hundred miles away. The carpenter worked on the
problem for forty years. His fourth clock, no larger than a saucer, lost five seconds in eighty-one
days, and the learned men who were to judge it asked him to prove that it had not been luck.
"""
