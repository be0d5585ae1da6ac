"""Nouns that scenes are composed of: countable things, named as emojibase labels them, with their plurals.

Chosen by hand so that "two X" is English and X says nothing of colour, number or place.
"""

IRREGULAR = {
    "mouse": "mice", "fish": "fish", "sheep": "sheep", "knife": "knives", "leaf": "leaves", "tomato": "tomatoes",
    "potato": "potatoes", "octopus": "octopuses", "strawberry": "strawberries", "cherries": "cherries",
    "butterfly": "butterflies", "teddy bear": "teddy bears", "watch": "watches", "bus": "buses", "fox": "foxes",
    "sandwich": "sandwiches", "peach": "peaches", "dress": "dresses", "glasses": "glasses", "toothbrush": "toothbrushes",
    "ox": "oxen", "goose": "geese", "ostrich": "ostriches", "canoe": "canoes", "scarf": "scarves", "wolf": "wolves",
    "mango": "mangoes", "fly": "flies", "cactus": "cactuses", "lobster": "lobsters", "squid": "squids", "toothpaste": "",
    "torch": "torches", "fairy": "fairies", "candy": "candies", "lollipop": "lollipops", "compass": "compasses",
    "wrench": "wrenches", "hibiscus": "hibiscuses",
}  # fmt: skip

NOUNS = (
    "cat dog lion tiger horse cow pig sheep goat camel giraffe elephant rhinoceros hippopotamus mouse hamster rabbit "
    "hedgehog bat bear koala panda kangaroo badger turkey rooster chicken penguin eagle duck swan owl flamingo peacock "
    "parrot frog crocodile turtle lizard snake whale dolphin seal fish shark octopus snail butterfly bug ant honeybee "
    "beetle cricket spider scorpion fly worm squirrel raccoon skunk otter sloth beaver gorilla orangutan wolf fox zebra "
    "deer bison monkey crab lobster shrimp squid oyster unicorn dragon leopard llama "
    "apple pear peach pineapple banana lemon tangerine watermelon melon strawberry mango coconut tomato avocado eggplant "
    "potato carrot mushroom broccoli onion pretzel bagel pancakes waffle hamburger pizza sandwich taco burrito doughnut "
    "cookie lollipop croissant egg cupcake pie "
    "rose tulip sunflower hibiscus cactus "
    "bicycle motorcycle bus tractor taxi locomotive helicopter rocket sailboat canoe ambulance airplane anchor satellite "
    "skateboard tent house castle church "
    "umbrella balloon kite ribbon trophy basketball football volleyball bowling tennis guitar violin trumpet drum "
    "saxophone accordion banjo radio television camera telephone computer laptop keyboard printer candle bell key lock "
    "hammer axe wrench screwdriver scissors magnet ladder microscope telescope syringe toothbrush broom basket sponge "
    "bucket soap toilet bathtub chair bed couch door mirror book newspaper pencil crayon envelope package briefcase "
    "backpack handbag purse glasses necktie jeans dress kimono bikini sandal crown hat ring watch hourglass compass "
    "abacus battery clipboard paperclip pushpin ruler bomb shield knife spoon teapot bottle "
    "snowflake snowman cloud star rainbow volcano fire droplet robot ghost alien skull brain tooth bone ear nose eye"
).split()


def plural(noun: str) -> str:
    """The plural of a noun of the vocabulary."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


# Pairs like jeans, and labels whose plural would be odd, are left out of scenes.
NOT_COUNTED = {"pancakes", "jeans", "glasses", "scissors", "fire", "soap", "bowling", "tennis", "football", "telephone"}
SCENE_NOUNS = tuple(noun for noun in dict.fromkeys(NOUNS) if noun not in NOT_COUNTED)


def with_article(noun: str) -> str:
    """ "a cat", "an owl"."""
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith(("uni", "euc")) else f"a {noun}"
