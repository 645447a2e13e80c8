"""Turn Debian's `wordnet-base` package into chat rows for pre-training a tiny English chat model.

    python tools/starter/corpus.py --out DIR [--wordnet DIR]

Without --wordnet the package is fetched by `apt-get download` (no root; `apt-get update` first where
the lists are old) and unpacked in a temporary folder; with it, the data files are read from DIR.
Written: dictionary.jsonl and heldout.jsonl, rows {"messages": [{"role", "content"}, ...]}, and facts.json.
What everyday.jsonl beside this script explains is not explained again; the words of heldout_words.txt
are never explained. Same inputs, same bytes: every choice hangs on SEED. `Lexicon` reads the files and picks senses,
`Nouns` decides about articles, `Writer` makes the pairs, `deal` joins them into conversations.
"""
import argparse
import collections
import hashlib
import json
import pathlib
import random
import re
import subprocess
import tempfile
from typing import NamedTuple

SEED = 0
EVERYDAY = pathlib.Path(__file__).with_name("everyday.jsonl")
LEAST_COMMON = 20                               # times a word is tagged or used in glosses: rarer ones are left out
LEAST_NAMED = 5                                 # as often: rarer ones are not even named as kinds or parts
LONG_CHARS = 3300                               # where a long conversation takes its last pair
TIERS = ((100, 6), (30, 5), (10, 3), (3, 2))    # commonness at least -> phrasings, else 1
HELD_OUT = pathlib.Path(__file__).with_name("heldout_words.txt").read_text(encoding="utf-8").split()

POS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
FILES = """adj adj adv Tops act animal artifact attribute body cognition communication event feeling
food group location motive object person phenomenon plant possession process quantity relation shape
state substance time""".split() + 15 * ["verb"] + ["adj"]       # lexicographer files by number
FUNCTION_WORDS = set("""a about above after all am an and any are as at be because been but by can did
do does for from had has have he her here his how i if in into is it its may me might more most must
my no not of off on or our out over shall she so some than that the their them then there they this
to too under up us was we were what when where who will with would you your""".split())
DETERMINERS = set("""a an the any anyone anything someone something one two three four five six seven
eight nine ten that what how each all some his her their its those these either both every no several
many more most whatever when where who""".split())
HEAD_ENDS = FUNCTION_WORDS - {"and", "or", "to", "more", "most"} | set("""which whose having used made
consisting especially usually often containing native similar designed between without during like
based given worn built found formed""".split())
RUDE = re.compile(r"""offensive|slur\b|disparag|obscen|vulgar|derogat|ethnic|taboo|sexual|genital|nazi|
prostitut|copulat|intercourse|penis|vagina|excre|feces|fecal|defecat|urinat|masturbat|\brap(e|ist)|
slave|negro|black.(person|people|man|woman)|suicid|whore|bitch|breasts|\bjew|homosexual|\bgays?\b|
lesbian|incest|\bsex\b|naked|nude|buttocks|bastard|retard|\bhell\b|damn|murder|erotic|anus\b|orgasm|
porn|rectum|stupid.person|Anglo-Saxon""".replace("\n", ""), re.I)
OBSCURE = re.compile(r"\b(genus|genera|phylum|suborder|subfamily|[A-Z][a-z]+(idae|aceae|ales))\b")
NO_GLOSS = re.compile(r"^(informal|slang|used (of|to|in|as|with|for)|see |usually |often |especially |"
                      r"originally |same as)|\bterms? (for|of)\b|\b(a targets|on which a)$")

# Nouns without an article: below the first sense of a "lemma:file", always or by default; of a file.
MASS_ROOTS = """fabric:artifact chromatic_color:attribute sport:act discipline:cognition
language:communication meat:food""".split()
SOFT_MASS_ROOTS = """game:act beverage:food illness:state disease:state flavorer:food music:communication
dance:act body_substance:body""".split()
MASS_FILES = {"substance", "feeling"}
SOFT_MASS_FILES = {"attribute", "state", "phenomenon", "process", "food"}
SOFT_MASS_ENDS = re.compile("(ing|ness|ity|ism|ship|wear|ware)$")
COUNT_FILES = {"animal", "artifact", "person", "plant", "body", "object", "group"}
ALWAYS_MASS = set("""scenery offspring freight cutlery transport clothing equipment furniture jewelry
headgear apparel salt soup summer winter spring autumn""".split())
ALWAYS_COUNT = set("compound hearing sheep fish franc".split())
WITH_THE = set("world universe sun moon sky equator horizon earth sea seaside countryside".split())
PLURAL_ONLY = set("""scissors trousers pants jeans shorts glasses spectacles clothes tongs pliers goggles
binoculars tweezers pajamas tights stairs stockings shears""".split())
SENSES = {"table": 2, "hammer": 2, "church": 2, "heart": 2, "salt": 2, "net": 2, "radio": 2, "brush": 2,
          "stem": 2, "battery": 2, "bank": 2, "plant": 2, "bowl": 1, "medicine": 2, "library": 3, "queen": 2,
          "seal": 9, "plate": 4}

ABSTRACT = set("""entity object whole unit abstraction attribute instrumentality artifact thing part
relation matter physical_object act event group state property quality cause creator""".split())
CATEGORIES = """animal:Tops person:Tops plant:Tops food:Tops bird:animal fish:animal insect:animal
tree:plant edible_fruit:food vegetable:food vehicle:artifact building:artifact tool:artifact
container:artifact garment:artifact musical_instrument:artifact weapon:artifact machine:artifact
metallic_element:substance liquid:substance""".split()
CONCRETE = {"animal", "artifact", "person", "plant", "food", "substance", "object", "body"}
# An example that is a whole sentence, as far as its first words tell.
AUXILIARY = "(" + "|".join("""is was are were has had have will would can could must should may might does
did isn't wasn't don't didn't can't couldn't won't wouldn't came went took gave saw began fell grew""".split()) + ")"
SENTENCE = re.compile(
    rf"((he|she|it)( \w+ly)? (\w+s|\w+ed|\w+t|\w+d|\w+ew|\w+o[kl]d?e?|{AUXILIARY})|(I|we|they|you) \w+|"
    rf"(he|she|it|they|we|you|I)'\w+|(the|his|her|my|our|their|this|these|an?) \w+( (?!who|that|which)\w+)? {AUXILIARY})"
    r"( \w[\w']*(-\w+)*,?){2,15}[?!]?", re.I)

ASK = {
    "n": """What {be} {np}?|What {be} {np}, please?|Can you tell me what {np} {be}?|Define {w}.|
what {be} {np}|Please explain what {np} {be}.|Do you know what {np} {be}?|Tell me what {np} {be}.""",
    "v": """What does it mean to {w}?|What does 'to {w}' mean?|What is it to {w}?|what does it mean to {w}|
Can you tell me what it means to {w}?|Please explain what it means to {w}.|Define the verb '{w}'.""",
    "a": """What does '{w}' mean?|What does the word '{w}' mean?|what does {w} mean|Explain what '{w}' means.|
What is the meaning of '{w}'?|Can you tell me what '{w}' means?|Please explain the word '{w}'.""",
    "hypernym": """What kind of thing {be} {np}?|What sort of thing {be} {np}?|What type of thing {be} {np}?|
Can you tell me what kind of thing {np} {be}?|what kind of thing {be} {np}|Which kind of thing {be} {np}?""",
    "kinds": """Name some kinds of {w}.|What kinds of {w} are there?|Can you name some kinds of {w}?|
Tell me some kinds of {w}.|Give me examples of kinds of {w}.|List some kinds of {w}.""",
    "parts": """What are the parts of {np}?|What parts does {np} have?|Name some parts of {np}.|
Which parts does {np} have?|Can you tell me the parts of {np}?|what are the parts of {np}""",
    "yes or no": "Is {np} {other}?|Is {np} {other}, please?|is {np} {other}|Tell me, is {np} {other}?|"
                 "Do you think {np} is {other}?|Would you say that {np} is {other}?",
    "synonym": """What is another word for {w}?|What is a synonym of {w}?|Give me another word for '{w}'.|
Tell me another word for {w}.|What word means the same as '{w}'?|what's another word for {w}?""",
    "opposite": """What is the opposite of {w}?|What's the opposite of {w}?|Tell me the opposite of {w}.|
What word means the opposite of '{w}'?|Give me the opposite of '{w}'.|what is the opposite of {w}""",
    "example": """Use the word '{w}' in a sentence.|Give me a sentence with the word '{w}'.|
Can you make a sentence with '{w}'?|Write a sentence with the word {w}.|Please use {w} in a sentence.|
Show me how to use '{w}' in a sentence.""",
}
ASK = {kind: text.replace("|\n", "|").split("|") for kind, text in ASK.items()}
ASK["r"] = ASK["a"]
NAMES = {"n": "noun definition", "v": "verb definition", "a": "adjective definition", "r": "adverb definition"}


class Synset(NamedTuple):
    key: tuple          # (part of speech, offset)
    file: str           # lexicographer file
    words: tuple        # as spelled, '_' for a space
    links: tuple        # (pointer symbol, word here or "", key there, number of the word there)
    gloss: str


class Entry(NamedTuple):
    pos: str
    word: str
    synset: Synset
    np: str             # 'a piano', 'water', 'scissors'; of other words than nouns the word
    be: str             # 'is' or 'are'
    answer: str         # the definition, a whole sentence
    number: int         # how many phrasings ask for it

    def is_subject(self, text):
        """Does the text define this noun: 'A piano is a ...'?"""
        return bool(re.match(rf"((an?|the) )?{plain(self.word)} (is|are) (an?|the) ", text, re.I))


def rng(*key):
    """A generator that depends on SEED and the key only."""
    return random.Random(":".join(map(str, (SEED, *key))))


def plain(word):
    return word.replace("_", " ")


def capital(text):
    return text[:1].upper() + text[1:]


def with_article(phrase):
    """'hour' -> 'an hour': by sound, as far as the spelling tells it."""
    vowel = re.match("[aeio]|u(?!ni(?![nm])|s[aeiu]|ten|ku|ra|ri)|hour|hono|honest|heir", phrase, re.I)
    return ("an " if vowel and not re.match(r"one\b|once|eu|ewe", phrase, re.I) else "a ") + phrase


def listing(items):
    return ", ".join(items[:-1]) + " and " + items[-1]


def usable(word):
    """Short, lower case, one or two words, no abbreviation, no function word, not rude."""
    return (re.fullmatch(r"[a-z]{2,14}([-_][a-z]{2,12})?", word) and re.search("[aeiouy]", word)
            and word not in FUNCTION_WORDS and not RUDE.search(plain(word)))


def definition(gloss):
    """The first clause of a gloss, without notes and examples, or None where it reads badly."""
    text = re.sub(r"\s*\([^()]*\)", "", gloss.split('"')[0])
    text = re.split(r";|:|--|,? i\.e\.", text)[0].replace(" e.g. ", " ")
    text = re.sub(r",?( or| and)? etc\b\.?", "", " ".join(text.split())).strip(" ,.")
    text = re.sub(r"`+([^`']*)'+", r"'\1'", text).replace(" ,", ",")
    good = re.fullmatch(r"[A-Za-z ,'-]+", text) and not NO_GLOSS.search(text) and not RUDE.search(gloss)
    good = good and text.split()[-1] not in FUNCTION_WORDS
    return text if good and 2 <= len(text.split()) <= 28 else None


class Lexicon:
    """The synsets, the senses of each lemma in order, and how common each lemma is."""

    def __init__(self, folder):
        self.synsets, self.senses, self.tags = {}, {}, collections.Counter()
        for name, pos in POS.items():
            for line in self.lines(folder / f"data.{name}"):
                self.read_synset(pos, line)
            for fields in map(str.split, self.lines(folder / f"index.{name}")):
                self.senses[pos, fields[0]] = [(pos, o) for o in fields[-int(fields[2]):]]
        for key, sense, count in map(str.split, self.lines(folder / "cntlist.rev")):
            lemma, rest = key.split("%")                    # the tag counts of index.sense
            pos = "_nvara"[int(rest[0])]
            self.tags[pos, lemma, int(sense) - 1] += int(count)
            self.tags[pos, lemma] += int(count)
        self.base = {self.plural(w): w for p, w in self.senses if p == "n"}
        irregular = (x.split()[:2] for x in self.lines(folder / "noun.exc"))
        self.base.update((many, one) for many, one in irregular if ("n", one) in self.senses)
        glosses = [s.gloss.lower() for s in self.synsets.values()]
        self.texts = [re.findall(r"[a-z]+(?:-[a-z]+)*|[^\w\s]", g) for g in glosses]
        self.seen = collections.Counter(t for text in self.texts for t in text)
        self.seen.update(f"{a}_{b}" for text in self.texts for a, b in zip(text, text[1:]))

    @staticmethod
    def lines(path):
        return [x for x in path.read_text(encoding="utf-8").splitlines() if x[0] != " "]

    @staticmethod
    def plural(word):
        if re.search(r"(s|x|z|ch|sh)$", word):
            return word + "es"
        return word[:-1] + "ies" if re.search("[^aeiou]y$", word) else word + "s"

    def read_synset(self, pos, line):
        head, gloss = line.split(" | ", 1)
        f = head.split()
        at = 5 + 2 * int(f[3], 16)
        words = tuple(re.sub(r"\(\w+\)$", "", w) for w in f[4:at - 1:2])
        fields = [f[i:i + 4] for i in range(at, at + 4 * int(f[at - 1]), 4)]
        links = tuple((symbol, words[int(ends[:2], 16) - 1] if int(ends, 16) else "",
                       (there, offset), int(ends[2:], 16)) for symbol, offset, there, ends in fields)
        self.synsets[pos, f[0]] = Synset((pos, f[0]), FILES[int(f[1])], words, links, gloss.strip())

    def sense(self, pos, lemma):
        """The first sense; but a noun's concrete one that has many kinds and parts may outdo it."""
        keys = self.senses[pos, lemma]

        def weight(i):
            kinds = sum(link[0] in ("~", "%p") for link in self.synsets[keys[i]].links)
            return self.tags[pos, lemma, i] + min(12, kinds) / 3

        fit = [i for i, k in enumerate(keys) if lemma in self.synsets[k].words]
        if pos == "n" and lemma in SENSES:
            fit = [SENSES[lemma] - 1]
        elif pos == "n":
            fit = fit[:1] + [i for i in fit[1:] if self.synsets[keys[i]].file in CONCRETE - {"person"}]
        return self.synsets[keys[max(fit, key=weight)]] if fit and (pos == "n" or 0 in fit) else None

    def common(self, lemma):
        """How often the lemma is tagged, and how often glosses use it or its plural."""
        return (sum(self.tags[p, lemma] for p in POS.values()) + self.seen[lemma]
                + self.seen[self.plural(lemma)])

    def is_main(self, pos, lemma, share=0.5):
        """Is `pos` (at least nearly) the most frequent part of speech of the lemma?"""
        return self.tags[pos, lemma] >= share * max(self.tags[p, lemma] for p in POS.values())

    def linked(self, synset, symbols):
        return [self.synsets[there] for symbol, _, there, _ in synset.links if symbol in symbols]

    def ancestors(self, synset):
        found = [synset]
        for s in found:                                     # grows while it is read
            found += [up for up in self.linked(s, ("@", "@i")) if up not in found]
        return found[1:]

    def root(self, name):
        """The first sense of "lemma:file"."""
        lemma, file = name.split(":")
        return next(s for k in self.senses["n", lemma] if (s := self.synsets[k]).file == file)

    def name(self, synset):
        return next((w for w in synset.words if usable(w) and w not in ABSTRACT), None)

    def above(self, synset):
        """The name of the nearest hypernym that people use, and its synset; or (None, None)."""
        while ups := self.linked(synset, ("@",)):
            for up in ups:
                if self.name(up) and self.common(self.name(up)) >= 12:
                    return self.name(up), up
            synset = ups[0]
        return None, None


class Nouns:
    """Decides about articles: from how glosses and examples use a noun, else from its own gloss."""

    def __init__(self, lex):
        self.lex, self.single, self.bare = lex, collections.Counter(), collections.Counter()
        self.hard, self.soft = ([lex.root(x) for x in r] for r in (MASS_ROOTS, SOFT_MASS_ROOTS))
        for text in lex.texts:
            for before, word, after in zip(text, text[1:], text[2:] + ["."]):
                if after in FUNCTION_WORDS or not after[0].isalpha():
                    self.single[word] += before in ("a", "an", "another", "each", "every")
                    self.bare[word] += before in ("of", "with", "from", "for", "without", "like")

    def countable(self, word, synset, lean=1.0):
        """A greater `lean` says yes more readily."""
        last = re.split("[_-]", word)[-1]
        ups = self.lex.ancestors(synset) + [synset]
        if last in ALWAYS_COUNT or last in ALWAYS_MASS:
            return last in ALWAYS_COUNT
        if synset.file in MASS_FILES or any(r in ups for r in self.hard):
            return False
        article = re.match(r"(\([^)]*\) )?(an?|any|someone|one) ", synset.gloss)
        count = self.single[last] + self.lex.seen[self.lex.plural(last)] / 2
        if count + self.bare[last] >= 4:
            return count * lean * (2.0 if article else 0.7) > self.bare[last]
        if synset.file in SOFT_MASS_FILES or SOFT_MASS_ENDS.search(last) or any(r in ups for r in self.soft):
            return False
        return bool(article) or synset.file in COUNT_FILES

    def subject(self, word, synset):
        """('a piano', 'is'), ('water', 'is'), ('the sun', 'is'), ('scissors', 'are'), or (None, None)."""
        if word in PLURAL_ONLY:
            return word, "are"
        if self.lex.base.get(word, word) != word:
            return None, None
        if word in WITH_THE:
            return "the " + word, "is"
        return (with_article(plain(word)) if self.countable(word, synset) else plain(word)), "is"

    def head(self, words, synset):
        """The head noun of a gloss without an article, its base form, and whether a hypernym names it."""
        names = {w.split("_")[-1] for s in self.lex.ancestors(synset) for w in s.words}
        head, base, sure = None, None, False
        for word in (w.strip(",") for w in words[:12]):
            if word in HEAD_ENDS or head and word.endswith("ed"):
                break
            one = self.lex.base.get(word, word)
            if ("n", one) in self.lex.senses and (one in names or not sure):
                head, base, sure = word, one, one in names
        return head, base, sure

    def complement(self, text, synset, countable):
        """The definition with the article that its head noun wants, or None where that is unclear."""
        words = text.split()
        head, base, sure = self.head(words, synset)
        if words[0].lower() in DETERMINERS or words[0].endswith("ing") and not sure:
            return text
        if re.search("[^dnvr]est$", words[0]) or words[0] in ("only", "first", "last", "main", "most"):
            return "the " + text
        if not base or not countable and base != head:
            return None if countable else text
        if base != head:                                    # 'vertebrates having' -> 'a vertebrate having'
            clash = rf"\b(are|have|their|they|them|and \w+s|{head} (and|or)|that (?!is|was|has|can|may|\w+s\b))\b"
            known = ("n", head) in self.lex.senses or re.search(clash, text)
            return None if known else with_article(text.replace(head, base, 1))
        sense = self.lex.sense("n", base)
        single = sense and not base.endswith("rs") and self.countable(base, sense, 3.0 if countable else 1.0)
        return with_article(text) if single else text


class Writer:
    """Makes the entries of all words and the (kind, question, answer) pairs of an entry."""

    def __init__(self, lex):
        self.lex, self.nouns = lex, Nouns(lex)
        self.categories = [lex.root(c) for c in CATEGORIES]
        order = sorted(lex.senses, key=lambda k: (-lex.common(k[1]), k))
        made = (self.entry(*k) for k in order if usable(k[1]) and lex.common(k[1]) >= LEAST_NAMED)
        self.entries = {(e.pos, e.word): e for e in made if e}

    def entry(self, pos, word):
        synset = self.lex.sense(pos, word)
        share = 0.1 if pos in "nv" else 0.5
        text = synset and self.lex.is_main(pos, word, share) and definition(synset.gloss)
        if not text or OBSCURE.search(synset.gloss) and self.lex.common(word) < 100:
            return None
        np, be, name = plain(word), "is", capital(plain(word))
        if pos == "n":
            np, be = self.nouns.subject(word, synset)
            text = np and self.nouns.complement(text, synset, np != plain(word))
            answer = text and f"{capital(np)} {be} {text}."
        elif pos == "v":
            text = re.sub("^to ", "", text)
            first = text.split()[0].strip(",")
            verb = ("v", first) in self.lex.senses or first.endswith("ly")
            answer = verb and word not in text and f"To {np} is to {text}."
        else:
            answer = f"{name} means {text}."
        if not answer or re.search(rf"\b(an?|the|to) {re.escape(np.split(' ')[-1])}\.$", answer):
            return None
        number = next((n for least, n in TIERS if self.lex.common(word) >= least), 1)
        return Entry(pos, word, synset, np, be, answer, number)

    def ask(self, kind, entry, number, **more):
        """`number` phrasings of a question, chosen by a hash; the plainest is among several."""
        forms, draw = list(ASK[kind]), rng(kind, entry.pos, entry.word, *more.values())
        plainest = number > 1 or draw.random() < 0.4
        draw.shuffle(forms)
        forms.sort(key=lambda f: plainest and f != ASK[kind][0])
        return [f.format(w=plain(entry.word), np=entry.np, be=entry.be, **more) for f in forms[:number]]

    def pairs(self, entry):
        """Every pair of an entry but the definition's: (kind, question, answer)."""
        found = [("synonym", self.synonym(entry), 2), ("opposite", self.opposite(entry), 3)]
        if entry.pos == "n":
            found += [("hypernym", self.hypernym(entry), 3), ("kinds", self.kinds(entry), 3),
                      ("parts", self.parts(entry), 3)]
            yield from self.yes_no(entry)
        for kind, answer, most in found:
            if answer:
                for question in self.ask(kind, entry, min(most, entry.number)):
                    yield kind, question, answer

    def hypernym(self, e):
        name, up = self.lex.above(e.synset)
        if not up or e.word.split("_")[-1] == name:
            return None
        higher, _ = self.lex.above(up)
        longer = higher and e.number > 1 and len(e.word) % 2
        second = f", which is a kind of {plain(higher)}" if longer else ""
        return f"{capital(e.np)} {e.be} a kind of {plain(name)}{second}."

    def phrases(self, synsets, least):
        """The subjects ('a pear') of the synsets that are their name's own sense, common ones first."""
        entries = {self.entries.get(("n", self.lex.name(s))) for s in synsets} - {None}
        known = [e for e in entries if e.synset in synsets and self.lex.common(e.word) >= least]
        return [e.np for e in sorted(known, key=lambda e: (-self.lex.common(e.word), e.word))][:5]

    def kinds(self, e):
        below = self.lex.linked(e.synset, "~")
        below += [s for b in below for s in self.lex.linked(b, "~")]
        names = self.phrases(below, 4) if e.synset.file in CONCRETE | {"Tops", "feeling"} else []
        return f"Some kinds of {plain(e.word)} are {listing(names)}." if len(names) > 2 else None

    def parts(self, e):
        names = self.phrases(self.lex.linked(e.synset, ("%p",)), 2) if e.synset.file in CONCRETE else []
        has = "has" if e.be == "is" else "have"
        return f"{capital(e.np)} {has} {listing(names)}." if len(names) > 1 else None

    def synonym(self, e):
        others = [w for w in e.synset.words if w[:4] != e.word[:4] and usable(w) and "_" not in w
                  and self.lex.sense(e.pos, w) == e.synset and self.lex.common(w) >= 5]
        best = max(others, key=self.lex.common, default=None)
        return best and f"Another word for {plain(e.word)} is {plain(best)}."

    def opposite(self, e):
        for key in self.lex.senses[e.pos, e.word][:2]:
            for symbol, mine, there, number in self.lex.synsets[key].links:
                other = self.lex.synsets[there].words[number - 1]
                if symbol == "!" and mine == e.word and usable(other) and self.lex.is_main(e.pos, e.word):
                    return f"The opposite of {plain(e.word)} is {plain(other)}."
        return None

    def yes_no(self, e):
        """One question with the answer yes and two with no, each with the hypernym as its reason."""
        name, _ = self.lex.above(e.synset)
        ups = self.lex.ancestors(e.synset)
        senses = [self.lex.synsets[k] for k in self.lex.senses["n", e.word]]
        every = senses + [up for s in senses for up in self.lex.ancestors(s)]
        right = [c for c in self.categories if c in ups]
        wrong = [c for c in self.categories if c not in every]
        if not (name and right and e.be == "is" and e.number > 1 and e.synset.file in CONCRETE):
            return
        draw = rng("yes or no", e.word)
        for said, category in [("Yes", draw.choice(right))] + [("No", c) for c in draw.sample(wrong, 2)]:
            lemma = category.words[0]
            other = {"food": "a kind of food", "edible_fruit": "a fruit", "metallic_element": "a metal"}.get(
                lemma, with_article(plain(lemma)))
            question = self.ask("yes or no", e, 1, other=other)[0]
            yield "yes or no", question, f"{said}. {capital(e.np)} is a kind of {plain(name)}."

    def examples(self):
        """The quoted examples that are whole sentences and hold the word or a form of it."""
        for synset in self.lex.synsets.values():
            texts = [] if RUDE.search(synset.gloss) else re.findall(r'"([^"]+)"(?=\s*(?:;|$))', synset.gloss)
            for text in (t.strip(" .,;") for t in texts):
                for word in filter(usable, synset.words):
                    stem = plain(word)[:-1] if len(word) > 4 else plain(word)
                    if SENTENCE.fullmatch(text) and re.search(rf"\b{stem}\w?(s|es|d|ed|ing|er|est|ies|ied)?\b", text.lower()):
                        entry = Entry(synset.key[0], word, synset, "", "", text, 1)
                        said = re.sub(r"\bi\b", "I", capital(text)) + ("" if text[-1] in "?!" else ".")
                        yield "example", self.ask("example", entry, 1)[0], said


def deal(pairs):
    """Deals shuffled (question, answer) pairs into rows: most single, a fifth of 2 to 6, 1% long."""
    draw, rows = rng("rows"), []
    draw.shuffle(pairs)
    while pairs:
        kind, row, size = draw.random(), [], 0
        turns = 1 if kind < 0.79 else draw.randint(2, 6) if kind < 0.99 else draw.randint(15, 40)
        while pairs and len(row) < turns and size < LONG_CHARS:
            row.append(pairs.pop())
            size += sum(map(len, row[-1]))
        rows.append(row)
    return rows


def save(path, rows):
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            messages = [{"role": role, "content": text}
                        for pair in row for role, text in zip(("user", "assistant"), pair)]
            out.write(json.dumps({"messages": messages}) + "\n")


def fetch(folder):
    """Downloads and unpacks the package; returns the data folder and the facts of the package."""
    subprocess.run(["apt-get", "download", "-qq", "wordnet-base"], cwd=folder, check=True)
    deb = next(folder.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
    version = subprocess.check_output(["dpkg-deb", "-f", deb, "Version"], text=True).strip()
    facts = {"version": version, "sha256": hashlib.sha256(deb.read_bytes()).hexdigest()}
    return folder / "usr/share/wordnet", facts


def build(folder, package, out, everyday):
    """Writes the three files."""
    writer = Writer(Lexicon(folder))
    told = {e for e in writer.entries.values() if e.pos == "n" and any(map(e.is_subject, everyday))}
    held = [writer.entries["n", w] for w in HELD_OUT]
    synsets = {e.synset.key for e in held}
    pairs = list(writer.examples())
    for e in writer.entries.values():
        if writer.lex.common(e.word) < LEAST_COMMON:
            continue
        pairs += writer.pairs(e)
        if e.word not in HELD_OUT and e.synset.key not in synsets and e not in told:
            pairs += [(NAMES[e.pos], question, e.answer) for question in writer.ask(e.pos, e, e.number)]
    pairs = list(dict.fromkeys(pairs))
    rows = deal([p[1:] for p in pairs])
    out.mkdir(parents=True, exist_ok=True)
    save(out / "dictionary.jsonl", rows)
    save(out / "heldout.jsonl", [[(ASK["n"][0].format(np=e.np, be=e.be), e.answer)] for e in held])
    facts = {"package": "wordnet-base", **package, "license": "WordNet 3.0 License", "seed": SEED,
             "pairs": collections.Counter(p[0] for p in pairs), "all_pairs": len(pairs), "rows": len(rows),
             "characters": sum(len(text) for p in pairs for text in p[1:]), "heldout_words": HELD_OUT}
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--wordnet", type=pathlib.Path, help="folder with data.noun and so on")
    options = parser.parse_args()
    everyday = [json.loads(row)["completion"] for row in EVERYDAY.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as temporary:
        package = {"version": None, "sha256": None}
        folder, package = (options.wordnet, package) if options.wordnet else fetch(pathlib.Path(temporary))
        build(folder, package, options.out, everyday)


if __name__ == "__main__":
    main()
