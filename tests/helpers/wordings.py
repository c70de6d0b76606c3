"""Pairs of questions that ask for the same fact, and that do not."""

import itertools

from ember.data.types import Question

# Each asks for one fact in two wordings: question, answer, question, answer.
PARAPHRASES = [
    ("Who turned everything to gold?", "Midas", "What did Midas turn everything into?", "gold"),
    ("Which river flows through Rome?", "the Tiber", "What is the river that Rome was built beside?", "Tiber"),
    ("In what year did Vesuvius bury Pompeii?", "79 AD", "When was Pompeii destroyed by Vesuvius?", "79 AD"),
    ("Who crossed the Rubicon in 49 BC?", "Julius Caesar", "Which general led an army over the Rubicon?", "Caesar"),
    ("What is a legionary's curved shield?", "a scutum", "A scutum was which piece of legionary gear?", "the shield"),
    ("Which god carried a trident?", "Neptune", "What weapon did the god Neptune carry?", "a trident"),
    ("Who wrote the epic poem Aeneid?", "Virgil", "The Aeneid was written by which poet?", "Virgil"),
    ("Which ruler was the first emperor?", "Augustus", "Who became the first emperor?", "Augustus"),
    ("What is the capital of Australia?", "Canberra", "Canberra is the capital of which country?", "Australia"),
    ("Which planet did Herschel discover?", "Uranus", "Who discovered the planet Uranus?", "William Herschel"),
    ("How many hills was it built on?", "seven", "On what number of hills did they build?", "seven"),
    ("Which metal is liquid at room temperature?", "mercury", "At room temperature, which metal is liquid?", "Hg"),
]


ALIASES = {"Julius Caesar": ("Caesar",), "Caesar": ("Julius Caesar",), "a scutum": ("scuta",)}


# Each pair has something in common, but asks for two facts.
DIFFERENT = {
    "same answer": [
        ("Which goddess gave Athens its name?", "Athena", "Who sprang fully armed from the head of Zeus?", "Athena"),
        ("Who was stabbed on the Ides of March?", "Brutus's friend", "Who reformed the calendar?", "Brutus's friend"),
        ("What did bakers grind into flour?", "wheat", "Which crop was shipped from Egypt?", "the wheat"),
        ("Which tongue did senators learn?", "Greek", "In which language are the Meditations?", "Greek"),
        ("Who fiddled while the city burned?", "Nero", "Which ruler built the Golden House?", "Nero"),
        ("What did gladiators fight in?", "an arena", "Which Latin word means sand?", "arena"),
    ],
    "same wording": [
        ("Who was the god of war?", "Mars", "Who was the god of fire?", "Vulcan"),
        ("What is the capital of Portugal?", "Lisbon", "What is the capital of Norway?", "Oslo"),
        ("In which year did the Great War begin?", "1914", "In which year did the Great War end?", "1918"),
        ("Which element has the symbol U?", "uranium", "Which element has the symbol Pu?", "plutonium"),
        ("Who built a wall in Britain?", "Hadrian", "Who built a column in his forum?", "Trajan"),
    ],
    "answer in the other question": [
        ("Which metal did plumbers use for pipes?", "lead", "Who warned that lead harms workers?", "Vitruvius"),
        ("Who was the wife of Augustus?", "Livia", "Which poet did Augustus banish?", "Ovid"),
    ],
}


DIFFERENT_PAIRS = list(itertools.chain(*DIFFERENT.values()))


def question(text: str, answer: str = "Rome", *aliases: str) -> Question:
    return Question("q", "concept", "test", text, answer, ("x", "y", "z"), aliases or ALIASES.get(answer, ()))
