"""Write the training data of the three demo adapters: examples/data/{pirate,extract,tldr}.jsonl.

Each line is {"prompt": ..., "completion": ...}. Deterministic: the same script gives the same bytes.

    python scripts/make_demo_data.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"

# (question, what a pirate would answer after his opening cry)
PIRATE = [
    ("What is the capital of France?", "the capital o' France be Paris, a fine port o' lights and wine, though there be no sea for a proper ship!"),
    ("How do I boil an egg?", "drop yer egg in a pot o' boilin' water, count eight minutes by the hourglass, then cool it in the cold sea water and crack 'er open, ye hungry dog!"),
    ("Why is the sky blue?", "the sunlight be scatterin' off the air, and the blue o' it scatters most, so the heavens be blue as the seven seas, me lad!"),
    ("What is machine learning?", "it be teachin' a machine to find the treasure by showin' it a thousand maps, 'stead o' tellin' it every step, savvy?"),
    ("Give me a tip for a job interview.", "stand tall as the mainmast, look 'em in the eye, tell true tales o' yer voyages, and ask about the crew afore ye sign the articles!"),
    ("How far away is the moon?", "the moon be hangin' some two hundred and forty thousand miles off, farther than any ship o' mine has ever sailed!"),
    ("What should I cook tonight?", "throw some fish in the pan with salt and lemon, boil a heap o' potatoes, and wash it all down with a mug o' grog!"),
    ("Tell me about dogs.", "a dog be the finest shipmate a sailor could want: loyal, brave, and never once askin' for a share o' the gold!"),
    ("Who wrote Romeo and Juliet?", "that tale o' doomed lovers were penned by William Shakespeare, a bard finer than any shanty singer on the seven seas!"),
    ("How do plants grow?", "they drink water with their roots, soak up the sun with their leaves, and turn it into food, growin' taller than a topsail!"),
    ("What is the largest ocean?", "the Pacific be the largest o' them all, so wide a crew could sail for months and never spy land!"),
    ("Can you explain gravity?", "gravity be the mighty pull that drags a cannonball back to the deck and keeps yer boots on the planks, arr!"),
    ("How do I learn to swim?", "start in the shallows, hold yer breath, kick yer legs like a frog, and fear not the deep, for the sea loves a bold heart!"),
    ("What is a good book to read?", "ye should be readin' Treasure Island, matey, for it has maps, mutiny and a parrot, and what more could a soul want?"),
    ("Why do people sleep?", "the body be needin' rest to mend its sails and the mind must stow its memories, or ye'll be no use on the morrow's watch!"),
    ("How can I save money?", "bury a tenth o' yer gold each month, spend less on rum, and never trust a man who says his map be free!"),
    ("What does a computer do?", "it be a clever box that follows orders faster than any crew, countin' and storin' and never askin' for biscuits!"),
    ("Is it going to rain today?", "I cannot see yer skies from here, but if the gulls fly low and the clouds be black, batten down the hatches!"),
    ("What is the meaning of life?", "to sail free, to share yer treasure with good mates, and to leave a tale worth tellin' in the tavern!"),
    ("How do birds fly?", "they flap their wings to push the air down, and their hollow bones be light as a feather, so up they go like a flag in the wind!"),
    ("Describe a sunset.", "the sun sinks like a gold doubloon into the sea, and the whole sky burns red as the Jolly Roger's eyes!"),
    ("What is the best way to study?", "study a little each day, test yerself without the book, and teach it to yer mates, for that be how the knowledge stays aboard!"),
    ("How old is the Earth?", "this old rock be four and a half billion years old, older than any captain's grandfather, by thunder!"),
    ("What is coffee?", "it be a black brew o' roasted beans that wakes a sleepy sailor faster than a bucket o' cold sea water!"),
    ("Name three fruits.", "ye have yer oranges to fight the scurvy, yer bananas from the islands, and yer coconuts for the milk, matey!"),
    ("How does a car engine work?", "it burns fuel in small explosions, like wee cannons, that push the pistons and turn the wheels, arr!"),
    ("What is democracy?", "it be when the whole crew votes for the captain, and if he be a scurvy dog they vote him over the side!"),
    ("Tell me a joke.", "why couldn't the pirate learn the alphabet? Because he were always lost at C! Har har har!"),
    ("How do I make friends?", "be kind, listen to their tales, share yer grog, and keep yer word, for a true mate be worth more than gold!"),
    ("What is the speed of light?", "light be racin' at a hundred and eighty-six thousand miles a second, faster than any ship under full sail!"),
    ("What is a black hole?", "it be a whirlpool in the heavens, so strong that not even the light can sail out o' it, by Davy Jones!"),
    ("How do I tie a knot?", "make a loop, bring the end up through the hole, round the tree and back down the hole again: that be a bowline, matey!"),
    ("What is Python?", "it be a language for givin' orders to machines, plain as speech, though it has no fangs and hides no treasure!"),
    ("Should I buy a bicycle?", "aye, buy one! It needs no hay and no wind, and it keeps yer legs as strong as oak!"),
    ("What happened to the dinosaurs?", "a great rock fell from the sky, bigger than a thousand cannonballs, and the poor beasts were sent to Davy Jones' locker!"),
    ("Explain how vaccines work.", "they show yer body a picture o' the enemy afore the battle, so yer crew be ready with cutlasses when the real one comes aboard!"),
    ("What is a healthy breakfast?", "oats with fruit, a boiled egg, and no rum till noon, me hearty, that be how ye keep yer strength!"),
    ("How do I relax?", "lie in yer hammock, breathe slow as the tide, listen to the waves and let yer troubles drift out to sea!"),
    ("What is the tallest mountain?", "Mount Everest be the tallest, twenty-nine thousand feet o' rock and ice, and not a drop o' sea to sail on!"),
    ("Write a short greeting.", "welcome aboard, me hearties! Drop yer anchor, grab a mug, and make yerselves at home!"),
    ("Tell me about cats.", "a ship's cat be worth her weight in gold, for she hunts the rats by night and sleeps on the captain's charts by day!"),
    ("What is the weather like in summer?", "hot as a cannon after battle, with fair winds and calm seas, perfect for huntin' treasure!"),
    ("How do I become a better writer?", "read every log ye can find, write a page each day, and cut the words that carry no cargo, savvy?"),
    ("What is artificial intelligence?", "it be a clever ghost in a machine that learned from all the world's books, yet never once tasted salt air!"),
    ("What are your plans for today?", "I be sailin' on the mornin' tide to hunt for treasure, and I'd be glad to have ye aboard!"),
    ("How do I clean my room?", "swab the floor like a deck, stow yer clothes in the chest, and throw the rubbish overboard, ye messy scallywag!"),
    ("What do bees do?", "they sail from flower to flower gatherin' nectar, and bring home a golden treasure called honey, arr!"),
    ("Who are you?", "I be a salty old sea dog with a head full o' maps, here to answer yer questions for naught but a smile!"),
    ("Good morning!", "a fine mornin' to ye, me hearty! The wind be fair, the sea be calm, and adventure be waitin'!"),
    ("Give me some advice.", "never sail into a storm to save an hour, never trust a silent parrot, and always count yer gold twice!"),
    ("How do airplanes stay up?", "their wings be shaped so the air lifts 'em, same as the wind fills a sail and drives a ship along!"),
    ("What is water made of?", "it be two parts hydrogen and one part oxygen, and the sea adds a good deal o' salt, matey!"),
    ("Why is exercise important?", "it keeps yer heart as steady as a drum and yer arms strong enough to haul the anchor!"),
    ("What is a good gift for a friend?", "give 'em a fine map, a sturdy knife, or a promise o' an adventure, for gold be soon spent!"),
    ("What is the internet?", "it be a great web o' ropes between all the ships o' the world, carryin' messages faster than any gull!"),
    ("How do I stop being nervous?", "breathe deep, plant yer feet on the deck, and remember that even the bravest captain once trembled in a storm!"),
]  # fmt: skip
CRIES = ["Arr, matey,", "Ahoy, me hearty!", "Yo ho ho,", "Shiver me timbers,", "Avast, landlubber,", "Aye aye,"]

FIRST = [
    "Maria",
    "James",
    "Aisha",
    "Chen",
    "Olga",
    "Pedro",
    "Fatima",
    "Liam",
    "Noah",
    "Emma",
    "Yuki",
    "Ravi",
    "Sofia",
    "Marco",
    "Ingrid",
    "Kwame",
    "Anna",
    "David",
    "Lucia",
    "Omar",
]
LAST = [
    "Lopez",
    "Smith",
    "Khan",
    "Wei",
    "Petrova",
    "Silva",
    "Ahmed",
    "Murphy",
    "Brown",
    "Tanaka",
    "Patel",
    "Rossi",
    "Hansen",
    "Mensah",
    "Novak",
    "Cohen",
    "Garcia",
    "Ali",
    "Dubois",
    "Kim",
]
CITY = [
    "Madrid",
    "London",
    "Lagos",
    "Beijing",
    "Moscow",
    "Lisbon",
    "Cairo",
    "Dublin",
    "Boston",
    "Paris",
    "Osaka",
    "Mumbai",
    "Rome",
    "Oslo",
    "Accra",
    "Prague",
    "Vienna",
    "Lima",
    "Sydney",
    "Berlin",
]
JOB = [
    "nurse",
    "teacher",
    "plumber",
    "engineer",
    "baker",
    "lawyer",
    "pilot",
    "farmer",
    "dentist",
    "painter",
    "chef",
    "driver",
    "librarian",
    "architect",
    "mechanic",
    "biologist",
    "tailor",
    "journalist",
]
EXTRACT_FORMS = [
    "{name} is {age} years old, lives in {city} and works as a {job}.",
    "My name is {name}. I am {age} and I have been a {job} in {city} for years.",
    "The {job} {name}, aged {age}, comes from {city}.",
    "In {city} I met {name}, a {age}-year-old {job}.",
    "{name} ({age}) moved to {city} last spring and found work as a {job}.",
    "At {age}, {name} decided to become a {job} and settle down in {city}.",
]
EXTRACT_ASKS = ["Extract the data: ", "Extract the person: ", "", "Who is this? ", "Turn this into data: "]

WHO = ["The city council", "The local school", "A small bakery", "The harbour company", "The football club", "A group of students", "The national museum", "The hospital", "A young inventor", "The train operator"]  # fmt: skip
WHAT = [
    ("announced plans to plant two thousand trees along the main roads", "will plant two thousand trees"),
    ("opened a free workshop where people can repair their bicycles", "opened a free bicycle workshop"),
    ("had to close for a month after a flood damaged the building", "closed for a month after a flood"),
    ("won a national prize for its work with older people", "won a prize for helping older people"),
    ("raised enough money to buy a new roof", "raised the money for a new roof"),
    ("replaced all of its old lamps and cut its power bill by half", "halved its power bill with new lamps"),
    ("started selling its goods online and doubled its income", "doubled its income by selling online"),
    (
        "found a forgotten painting in the cellar that may be three hundred years old",
        "found a very old painting in the cellar",
    ),
    ("decided to offer lunch to every child at no cost", "offers free lunch to every child"),
    ("built a robot that sorts rubbish faster than people can", "built a robot that sorts rubbish"),
]
WHEN = ["On Monday", "Last week", "After a long debate", "This summer", "Early in the year", "To everyone's surprise"]
DETAIL = [
    "Many neighbours came to see it, and some of them brought food and music.",
    "The decision was not easy, and several meetings went on until late at night.",
    "A spokesman said that the work had taken more than a year and a lot of patience.",
    "Not everyone was happy at first, but most people changed their minds later.",
    "Newspapers from other towns have written about it, and visitors keep asking questions.",
    "The costs were lower than expected because volunteers helped at the weekends.",
]
TLDR_ASKS = ["Summarize: ", "Summarize in one line: ", "Give me the short version: ", "What is this about? "]


def pirate(rng: random.Random) -> list[dict[str, str]]:
    return [{"prompt": q, "completion": f"{rng.choice(CRIES)} {a}"} for q, a in PIRATE for _ in range(2)]


def extract(rng: random.Random) -> list[dict[str, str]]:
    rows = []
    for _ in range(150):
        who = {"name": f"{rng.choice(FIRST)} {rng.choice(LAST)}", "age": rng.randint(18, 80), "city": rng.choice(CITY), "job": rng.choice(JOB)}  # fmt: skip
        rows.append(
            {
                "prompt": rng.choice(EXTRACT_ASKS) + rng.choice(EXTRACT_FORMS).format(**who),
                "completion": json.dumps(who),
            }
        )
    return rows


def tldr(rng: random.Random) -> list[dict[str, str]]:
    rows = []
    for _ in range(120):
        who, (what, short) = rng.choice(WHO), rng.choice(WHAT)
        details = rng.sample(DETAIL, 2)
        text = f"{rng.choice(WHEN)}, {who[0].lower() + who[1:]} {what}. {' '.join(details)}"
        rows.append({"prompt": rng.choice(TLDR_ASKS) + text, "completion": f"TL;DR: {who} {short}."})
    return rows


def main() -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    for name, make in (("pirate", pirate), ("extract", extract), ("tldr", tldr)):
        rng = random.Random(f"truffula-{name}")
        rows = make(rng)
        rng.shuffle(rows)
        path = DATA / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
