"""Words that may stand behind a number and change nothing: 12 apples, 3 ways, 5 red marbles each.

A word of no table of units counts only if it is a plain noun: in the plural, or listed here. Numbers (hundreds,
thirds, dozens), verbs (fails), and whatever negates or hedges never do, so that what is not known is no unit.
"""

from __future__ import annotations

import re

_ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_TENS = "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = (
    "half halve third fourth quarter fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth fortieth fiftieth sixtieth seventieth "
    "eightieth ninetieth hundredth thousandth millionth billionth trillionth"
)
_LARGE = (
    "hundred thousand million billion trillion quadrillion zillion dozen score gross grosse lakh crore myriad googol "
    "mil grand zero nought nil ten twenti thirti forti fifti sixti seventi eighti nineti zeroe six sixe"
)
_CHANGING = (
    "percent percentage permille promille percentile factorial double triple treble quadruple quintuple fold twofold "
    "threefold sin sins tans negative reciprocal inverse opposite complement power exponent logarithm log modulo "
    "remainder radical squared cubed doubled order magnitude tre seize onze"
)
# Verbs and small words in -s that look like a plural.
_OTHERS = (
    "always perhaps besides sometimes does goes says gives makes takes works holds exists remains fails misses lacks "
    "exceeds differs equals contradicts violates breaks excludes includes stops ends becomes comes seems appears looks "
    "means shows proves disproves refutes denies rejects follows contains overestimates underestimates overshoots "
    "undershoots halves adds subtracts multiplies divides increases decreases grows shrinks rounds guesses errors "
    "mistakes alternatives hers ours yours theirs ones whereas needs wants wins loses cancels vanishes varies depends "
    "satisfies suffices requires less lots others else alias minus plus nonsense towards afterwards backwards "
    "downwards upwards was has its"
)
_NEVER = {
    word + end
    for group in (_ONES, _TENS, _ORDINALS, _LARGE, _CHANGING)
    for word in group.split()
    for end in ("", "s", "es")
} | set(_OTHERS.split())
_PLURAL = re.compile(r"[a-z]{3,}(?<![isu])s")  # not guess, minus, this, various

_KNOWN = set(
    # no plural in -s
    "people men women children feet teeth mice geese fish sheep deer oxen dice staff police cattle salmon shrimp "
    "data media criteria vertices indices matrices radii foci loci phenomena bacteria axes cacti buses bonuses viruses "
    "octopuses walruses classes glasses dresses passes losses bosses kisses masses crosses princesses mattresses "
    "taxis bikinis pairs "
    # what is counted once, and what is not counted
    "apple orange egg bird dog cat cow horse chicken duck puppy kitten book page pen pencil card ticket coin stamp toy "
    "game ball bag box bottle cup glass plate bowl can jar piece slice cake pie pizza cookie candy cupcake sandwich "
    "meal flower tree plant seed leaf rose car bus truck train boat bike bicycle plane trip ride mile house room floor "
    "door window table chair bed shirt dress shoe sock hat person man woman child boy girl kid baby student teacher "
    "friend player worker employee customer guest member team class school shop store company family group pair set "
    "way solution root element subset function point line edge vertex face side corner triangle square circle "
    "rectangle polygon cube sphere angle prime integer digit number term sequence permutation combination arrangement "
    "outcome pattern path step move round turn rotation revolution cycle lap race match goal vote dose pill tablet "
    "photo picture song video movie show episode message email call letter word sentence question problem test "
    "shift job task project item unit part share lot load row column layer level stage block brick tile "
    "stick rope string ribbon fabric cloth wool yarn thread wire paper cardboard wood steel iron gold silver copper "
    "sand gravel soil concrete cement water milk juice tea coffee soda wine beer oil gas gasoline petrol fuel paint "
    "ink soap sugar salt flour butter cheese bread rice pasta meat beef pork fruit lemonade ice cream chocolate honey "
    "corn wheat hay grass feed food candy jelly dough batter syrup medicine money cash rent tax profit income salary "
    "interest discount change tip homework laundry luggage furniture equipment work reading sleep time distance length "
    "width height area volume weight mass speed "
    # what describes
    "red blue green yellow white black brown pink purple gray grey small large big little tall long wide deep "
    "old high new young whole total full empty different distinct unique possible ordered unordered positive "
    "consecutive adult male female paper plastic wooden glass metal chocolate vanilla strawberry cherry apple fresh "
    "frozen free regular special single real complex rational integer each "
    "altogether together remaining left away".split()
)
# Said beside a noun, and no noun: they are left out of the unit.
_FILLERS = set("the a an of every your his her my our their".split())


def noun(word: str) -> str | None:
    """A word of a unit that is in no table, in the singular: "" for one that adds nothing, None for what is no plain
    noun. A hyphen's parts are words of their own."""
    word = word.lower()
    if any(part in _NEVER for part in word.split("-")):
        return None
    if word in _FILLERS:
        return ""
    if word in _KNOWN or _PLURAL.fullmatch(word):
        return _singular(word)
    return None


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:x|ch|sh|ss|z)es\Z", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
