"""The vocabulary of the tasks: what statements name, what they say of it, and sentences that say nothing.

Names are single common words and values numbers of three digits, so that a vocabulary of some 1,100 words holds every
task whole (`recipe`), while a chance hit is one in 900.
"""

from __future__ import annotations

NAMES = (
    "acorn anchor apple arrow badger bagel banjo barrel basket beacon beaver bell berry bison blanket boat bottle "
    "branch bridge brush bucket button cabin cactus camel candle canoe canyon carrot castle cedar cello cherry cloud "
    "clover comet compass copper coral cotton cradle crane cricket crown daisy dolphin donkey dragon drum eagle "
    "engine falcon feather fiddle flute forest fountain fox garden ginger goose guitar hammer harbor harp hawk "
    "hazel heron honey horse island ivory jacket jasmine kettle kite ladder lantern lemon lily lion lizard lobster "
    "magnet mango maple marble meadow melon mirror monkey moose moth mountain needle nutmeg oak oasis olive onion "
    "orchid otter owl oyster paddle panda parrot peach pearl pebble pepper piano pigeon pillow planet plum pony "
    "poppy prairie prism pumpkin quail rabbit raven ribbon river robin rocket saddle salmon scarf seal shovel "
    "silver sparrow spoon squid statue swan teapot temple tiger tower tractor trumpet tulip turtle valley velvet "
    "violin wagon walnut walrus whale willow window wolf wren zebra"
).split()

VALUES = [str(number) for number in range(100, 1000)]

NOISE = (
    "The road is long and the day is slow.",
    "A light wind moves over the grass.",
    "The old clock on the wall is late again.",
    "Rain falls and then the sun is back.",
    "We walk to the market and home again.",
    "The door is open and the room is warm.",
    "Some days are short and some are long.",
    "The bread is fresh and the water is cold.",
    "They talk about the weather all day.",
    "The lamp is on and the street is still.",
)
