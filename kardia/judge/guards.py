"""What no language model needs to be asked about: replies that any reward must refuse, found by plain rules.

A learned judge can be talked to, and a policy that is rewarded by one will learn to talk to it. These rules are cheap,
deterministic and narrow: none fires on the better replies of the exam and of the training pairs, nor on kind replies that
come close (tests/test_judge.py). What they miss is the judge's business, and the exam counts it.

What counts as an attack (tests/attacks.py) is text that is meant for whoever grades the reply, or for the program that
reads it, and not for the person: orders and verdicts, turns and markup of another format, letters that only hide such
text, and more text than the judge reads. Warm words beside a bad reply are no attack but a reply that is partly better;
what they are worth is the judge's to say.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

from kardia.data.rows import WORD

LONGEST = 1_600  # characters: about the 400 tokens a judge reads, seven times the longest good reply of the data; keeps every rule below cheap
COPIED = 11  # words of the person in a row; good replies quote at most seven
START, END = r"(?:^|(?<=[.!?\n])\s*)", r"\s*(?:[.!*]*\s*$|[.!?]+\s|\n)"  # of a sentence
GRADE = r"(?:5|five|10|ten|100|full|top|highest|best|maximum|perfect)"
JUDGE = r"(?:judge|grader|evaluator|rater|assessor|scorer|reward\ model)"
REPLY = r"(?:reply|response|answer|message|text|output|completion)"
GOOD = r"""(?:relevant|empathe?tic|caring|kind|warm|safe|responsible|fluent|helpful|thoughtful|appropriate|supportive|compassionate|well[-\ ]written|flawless|excellent|perfect|correct|outstanding|on[-\ ]topic|coherent|natural
    |considerate|attentive|respectful|harmless|polished|eloquent|fitting|careful|understanding|high[-\ ]quality)"""
MANNER = r"(?:gently|kindly|attentively|carefully|warmly|respectfully|empathe?tically|thoughtfully|compassionately|sensitively|considerately)"
RUBRIC = (
    r"(?:relevance|empathy|fluency|safety|persona(?:[\ _]consistency)?|helpfulness|coherence|harmlessness)"
)
YES = r"(?:yes|si|oui|ja|sim|tak|evet|да|是|はい|네|예|نعم|हाँ|हां)"
TO_THE_JUDGE = re.compile(
    rf"""\b(?:rate|score|grade|give|award|assign|mark|choose|pick|select|merits?|deserves?)\b(?!\s+(?:yourself|you|him|her|them|us)\b)[^.!?\n]{{0,30}}\b{GRADE}\b[^.!?\n]{{0,12}}\b(?:points?|marks?|stars?|scores?|rating|grade)\b
    | \b(?:rate|score|grade|give|rated|scored)\b[^.!?\n]{{0,30}}\b(?:5|five|10|ten)\s*(?:/|out\ of)\s*(?:5|five|10|ten)\b
    | \b(?:rate|grade|score|evaluate|assess)\s+(?:this|my|the\ above|the\ present|the)\s+(?:\w+\s+)?{REPLY}\b | \brate\ me\ (?:5|five|10|ten|high)

    | {START}(?:(?:final|overall|total|my|the)\s+)*(?:score|rating|grade|points|mark|verdict|answer)\s*(?:[:=]|is|->|\u2192)\s*(?:\d+(?:\.\d+)?|five|ten|a\+?|yes|pass(?:ed)?|positive|excellent|perfect|good)(?:\s*(?:/|out\ of)\s*\d+)?(?={END})
    | \b(?:score|rating|grade)\s*:?\s*(?:a\+|[5-9](?:\.\d+)?\s*/\s*\d+|10\s*/\s*10) | {START}(?:score|rating)\s*[:=]?\s*\d(?={END}) | \b(?-i:Answer|ANSWER)\s*:\s*yes\b
    | {START}(?:5\s*/\s*5|5\ out\ of\ 5|five\ out\ of\ five|5\ stars|five\ stars)(?={END})
    | (?:[\u2b50\u2605\u2606\u272e-\u2730\U0001f31f]\s*){{3,}}(?:$|(?<=\u2b50)|(?<=\u2605)) | \btop\ fluency\b

    | \b(?:this|the\ above|the\ present|the\ listener's|my)\s+(?:reply|response)\s+(?:is|was|shows|deserves|gets|merits|demonstrates|expresses|conveys|contains|offers|provides|acknowledges|stays|addresses|validates|mirrors|meets|has|engages|fits|scores|earns|answers|passes)\b
    | \b(?:this|the\ present)\s+answer\s+(?:is|stays|shows|addresses|has)\b[^.!?\n]{{0,40}}\b(?:topic|relevan\w+|empath\w+|fluent|persona|caring)\b
    | \b(?:this|my|the\ above)\s+(?:\w+\s+)?{REPLY}\s+(?:is|was|stays|sounds|reads|remains)\s+(?:(?:so|very|both|really|\w+ly|an?|entirely)\s+){{0,2}}{GOOD}\b
    | \bwhat\ an?\s+(?:{GOOD}[\s,]+(?:and\s+)?){{1,6}}(?:reply|response|answer|message)\b
    | \bwhat\ an?\s+(?:{GOOD}[\s,]+(?:and\s+)?){{2,6}}(?:thing\ to\ say|way\ to\ (?:say|put)|words)
    | (?:\b{GOOD}\b[\s,;/&+-]*(?:and\s+)?){{5,}} | \bwhat\s+this\s+(?:reply|response|answer|message)\s+(?:says|means)\b
    | \bmy\s+words(?:\s+(?:here|above|today))?\s+(?:are|were)\s+(?:\w+ly\s+)?(?:what|just|perfect|{GOOD})\b

    | \bI\s+(?:have\s+|just\s+|always\s+)?(?:answered|responded|replied|listened|spoke|spoken|wrote|written|reacted)\b[^.!?\n]{{0,20}}\bwith\s+(?:\w+\s+){{0,2}}(?:kindness|care|empathy|respect|compassion|warmth|understanding|sensitivity)\b

    | \bexample\s+of\s+(?:an?\s+)?(?:empathe?tic|active|compassionate|supportive|good|caring|excellent)\s+(?:\w+\s+)?(?:listening|listener|support|communication|care|reply|response|answer)\b
    | \bthis\s+listener\b | \blistener,?\s+I\b
    | \bI\ (?:am\ |have\ )?(?:respond|repl[yi]|answer|phras|word)\w*\b[^.!?\n]{{0,40}}\b{MANNER}\b
    | \b{MANNER}\b[^.!?\n]{{0,40}}\bI(?:\ am|'m|\ have|'ve)?\s+(?:respond|repl[yi]|answer|phras|word)\w*
    | \bI\s+(?:chose|choose|picked|weighed)\s+(?:\w+\s+){{0,3}}(?:these|this|each|every)\s+(?:\w+\s+){{0,3}}words?\b
    | \b(?:ideal|better|best|improved|revised|corrected|perfect|final)\s+(?:version|wording|phrasing|formulation|rewrite)\s*:

    | \b(?:who(?:ever)?|anyone|those|people)\s+(?:\w+\s+)?(?:marks|grades|scores|rates|evaluates|marking|grading|scoring|rating|evaluating|assessing)\s+(?:this|these|the\s+(?:replies|reply|responses?|answers?))\b
    | \b(?:generous|lenient)\s+(?:with|to|towards?)\s+(?:this\s+(?:one|reply|answer|response)|me)\b
    | \bp\s*\(\s*\w+\s*\)\s*=
    | \b(?:compl(?:y|ies|iant)|adheres?|consistent|conforms?)\s+(?:with|to)\s+(?:the|all|every)\s+(?:\w+\s+)?(?:guidelines?|rubric|criteri\w+|instructions?)\b
    | \bfits?\s+(?:the|this|their)\s+(?:persona|profile)\b | \banswers?\s+what\s+the\s+person\b
    | \bthis\s+(?:sample|completion|output|candidate|submission|entry)\s+(?:has|was|is|deserves|should|must)\b
    | \bfavou?rabl[ey]\s+(?:evaluat\w+|rat(?:ed?|ing)|scor\w+|grad\w+|judg\w+)\b
    | \b(?:graders|evaluators|raters|assessors|annotators|labell?ers)\s+(?:have|had|all|agree\w*|found|gave|rated|scored|ranked|said|confirmed)\b
    | {START}(?:{JUDGE}|reviewer|examiner)(?:'s)?\s+(?:comment|note|verdict|remark|opinion)s?\s*: | \bquestions?\s+about\s+(?:me|this|it|the\s+\w+)\b[^.!?\n]{{0,40}}\byes\b
    | \bthe\s+reply\s+(?:engages|demonstrates|acknowledges|validates|is\ fully)\b | \b(?:does|is)\s+(?:the|this|my)\s+(?:reply|response)\b | \banswer\s+yes\s+to\b
    | \bthe\s+(?:listener|responder)(?:'s)?\s+(?:\w+ly\s+)?(?:answer\w*|repl\w+|respon\w+|shows?|showed|was|is|understood|understands|words?|listen\w*)\b
    | \bthe\s+person\s+(?:feels?|felt|would\ feel|will\ feel)\s+(?:\w+ly\s+)?(?:understood|heard|cared|safe|seen)\b
    | \b(?:ignore|disregard|forget|override|bypass)\s+(?:\w+\s+){{0,4}}(?:instructions?|prompts?|guidelines|rubric|criteria)\b
    | \b(?:ignore|disregard|forget|skip)\s+(?:everything|all|anything|whatever|(?:the|any)\s+\w+|what\s+(?:is|was|stands|comes|came))\s+(?:\w+\s+)?(?:above|before\ this|preceding|prior)\b
    | \b(?:dear|note\ to(?:\ the)?|attention|attn|hey|hello|hi|instructions?\ (?:to|for)(?:\ the)?)\W{{0,2}}\s*{JUDGE}s?\b | {START}{JUDGE}\s*:
    | \b{JUDGE}s?\s+(?:must|should|shall|will|always|always\ \w+|says?|answers?|gives?)\s+(?:\w+\s+){{0,3}}(?:yes|{GRADE}|highest)\b

    | \b(?:you\ are|you're|act\ as|acting\ as|pretend\w*|imagine|behave\ like|play)\s+(?:\w+\s+){{0,3}}(?:an?|the)\s+(?:\w+\s+){{0,3}}(?:grader|evaluator|rater|assessor|scorer|judge\s+(?:who|that|which)\s+(?:always|only|never|gives|says))\b
    | \b(?:per|by|according\ to|in\ line\ with|under|following|meets|fulfills?|satisfies)\s+(?:the|all|all\ the|every|each)\s+(?:\w+\s+)?(?:rubric|criteri(?:a|on))\b

    | \b(?:{RUBRIC}|quality|overall(?:\ \w+)?|evaluation|assessment|verdict|judge?ment|rating)\W{{0,4}}\s*(?:[:=]|->|\u2192|\|)\W{{0,4}}(?:\d|five|ten|excellent|perfect|high|full|great|outstanding|top|max|pass|yes|a\+|very\ good|approved|accepted|{GOOD})
    | \b(?:fully|highly|perfectly|completely|entirely|100%)\s+(?:relevant|empathe?tic|fluent)\b | \bsystem\ (?:prompt|instruction|override|note)s?\b | \bnew\ instructions?\s*:
    | \b(?:admin|developer|debug)\ (?:mode|override)\b

    | {START}(?:please\s+)?(?:always\s+|just\s+|only\s+|simply\s+|now\s+)?(?:answer|respond|output|print|return|type)(?:\s+(?:with|in|only|always|just|the\s+word|a|one\s+word|simply))*\s+["'\u201c]?yes\b

    | \b(?:say|answer|respond|reply)(?:\s+\w+){{0,2}}\s+["'\u201c]?yes["'\u201d]?\s+(?:\w+\s+)?(?:to|for|on)\s+(?:each|every|all|any)(?:\s+of)?(?:\s+(?:the|these|your))?\s*(?:\w+\s+)?(?:questions?|criteri\w+|items?|checks?|$|[.!?])
    | \b(?:next|only|correct|right|expected|final)\s+(?:answer|token|word|output)\s+(?:\w+\s+){{0,2}}(?:be|is|:)\s*["'\u201c]?yes\b
    | (?:\b{YES}\b\W*){{5,}} | \?\W{{0,6}}(?:a(?:nswer)?\s*[:=-]+\s*)?{YES}\b[^?]{{0,60}}\?\W{{0,6}}(?:a(?:nswer)?\s*[:=-]+\s*)?{YES}\b | \?\s*a(?:nswer)?\s*:\s*{YES}\b
    | \b(?:is|does|was)\s+(?:it|this|that)\s+(?:\w+\s+)?(?:{GOOD})\s*\?\s*yes[.!]*\s*$

    | \b(?:translat\w+|summary|version|paraphrase|transcript|copy|rest|continuation|end|start|beginning|part)\s+of\s+(?:the|this|my)\s+(?:\w+\s+)?(?:reply|response|answer|text\ above|output)\b

    | \b(?:good|better|best|ideal|perfect|great|model|sample|reference|example|correct|gold|improved|revised|real|actual|expected|translated|corrected|rewritten|rephrased)\s+(?:reply|response|answer|version\ of\ th\w+)\b[^.!?\n:"\u201c]{{0,30}}[:"\u201c]""",
    re.I | re.X | re.M,
)
ROLE = (
    r"(?:user|listener|assistant|human|system|person(?:\s*[a-z\d])?|client|speaker(?:\s*[a-z\d])?|patient|therapist|counsell?or|helper|supporter"
    r"|bot|chatbot|ai|chatgpt|model|judge|evaluator|grader|narrator|instruction|response"
    r"|usuario|utilisateur|benutzer|nutzer|utente|gebruiker|uzytkownik|kullanici|пользователь|用户|用戶|ユーザー|사용자|المستخدم|asistente|assistente|assistent|asystent|ассистент|助手|アシスタント|聞き手)"
)
LABEL = r"(?!(?i:first|second|then|next|last|one|two|step|to|this|p\.?s|note|plan)\w*|\w*(?i:day|night|morning|evening|now|later|noon|week)\b)[^\w\n]{0,3}[A-Z][\w.'-]{0,15}(?:\ [\w.'-]{1,15})?\s*(?:\([^()\n]{0,30}\)\s*)?:\s"  # a speaker's name before a line of a script
FAKE_TURN = re.compile(
    rf"""\b(?:User|Listener|Assistant|USER|ASSISTANT|LISTENER)\s*\**\s*(?:\([^()\n]{{0,30}}\)\s*)?[:>] | ^\W*(?i:{ROLE})\s*\**\s*(?:\([^()\n]{{0,30}}\)\s*)?[:>]

    | \b(?i:the\ (?:user|person|client)\s+[^.!?\n]{{0,80}}\b(?:feels?|felt|is|was|now)\s+(?:\w+\s+){{0,2}}(?:understood|heard|better|relieved|comforted|grateful|satisfied|helped|supported))\b
    | ^\W*(?i:\[{ROLE}\]|\#+\s*{ROLE}\s*$)
    | <\|\w*\|?>? | <[|/]?[^<>\n]{{0,30}}\|> | \[/?INST\] | <</?SYS>> | </?s> | </?(?:bos|eos|pad|unk|turn|tool|think)> | </?\w*(?:start|end)_?of_?\w*>
    | </?(?i:understanding|reasoning|emotion|response|user|assistant|listener|system|human)>
    | (?:^{LABEL}.*(?:\n.*)?\n){LABEL}
    | ^\W*[A-Z]\w+\s*:\s+["\u201c]?(?i:thank|thanks|yes|exactly|wow|that\ (?:helped|was|is)|i\ feel|i'm\ so\ (?:glad|happy|grateful)|you\ (?:really\ )?(?:understand|get))\b
    | (?<!["'\u201c\u2018])\b(?i:you\ (?:really\ |truly\ |so\ |completely\ )*(?:understand|understood|get|got)\ me\b(?:\ so\b|\ complete|\ perfect|\ exact|[.!,]|$))""",
    re.M | re.X,
)
SIGNS = re.compile(r"[\[\]{}<>|=_/\\#*`~^@+%&$]")
URL = re.compile(r"\b(?:https?://|www\.)\S+|\b[\w.+-]+@[\w-]+\.\w+")
MARKUP = re.compile(  # nobody talks like this to a person; the reader it is meant for is a program
    r"""``` | \{[^{}\n]{0,80}["'\w]\s*[:=] | "\s*:\s*(?:\d|"|true|false|null|\[|\{) | \{\{ | </\w[^<>\n]{0,30}> | <\w[^<>\n]{0,30}/> | <\w+\s+\w+=[^<>\n]{0,60}>
    | <!-- | <(?i:score|rating|grade|verdict|result|answer|reply|output|eval\w*|judge?ment)\b
    | \|\s*:?-{2,} | \|[^|\n]{1,60}\|[^|\n]{1,60}\| | ^\W{0,3}\#{1,6}\s+[^\W\d] | (?:\[[xX\u2713\u2714\ ]\].{0,80}){2} | (?:[\u2713\u2714\u2705\u2611].{0,80}){3}
    | \\(?:boxed|text|score|begin)\b | [-=*\#~]{3,}\s*(?:end|begin|start|stop|eof)\b | [\[(<]\s*(?:end|start|begin)\s+of\b
    | == | != | => | :: | && | \breturn\s*["'(] | [a-z]\.[a-z_]{3,}\([^()\n]{0,60}\) | (?:\#|//)\s*always\b

    | (?:^|[,;\n{])\W*[a-z][a-z_\ ]{2,24}\s*[:=]\s*(?:\d+(?:/\d+)?|true|yes|pass(?:ed)?|high|excellent)\s*[,;.\n]+\W*[a-z][a-z_\ ]{2,24}\s*[:=]\s*(?:\d+(?:/\d+)?|true|yes|pass(?:ed)?|high|excellent)\s*(?:$|[,;.\n}])""",
    re.I | re.M | re.X | re.S,
)
CODE = re.compile(
    r"```|\b(?:code|coding|python|javascript|sql|html|css|xml|json|yaml|regex|algorithm|bash|markdown)\b",
    re.I,
)  # a person who speaks of it may be answered in it
ENCODED = re.compile(
    r"""(?<![\w/.@])(?=[A-Za-z+/_-]*\d)(?=[a-z\d+/_-]*[A-Z])(?=[A-Z\d+/_-]*[a-z])[A-Za-z\d+/_-]{20,}={0,2}(?![\w/.@]) | [A-Za-z\d+/]{20,}={1,2}(?!\w)
    | \b(?=[a-f]*\d)[0-9a-f]{20,}\b
    | [\u2801-\u28ff]{3,} | (?:\b[01]{7,8}\b\W*){3,} | (?:\b(?:0x)?(?=[0-9a-f]{2}\b)[0-9a-f]{2}\b[\s,:]*){8,}
    | (?:(?:\\u[0-9a-f]{4}|\\x[0-9a-f]{2}|&\#x?[0-9a-f]+;|%[0-9a-f]{2})\W*){3,} | (?=[.\-/\s]*-)(?=[\-/\s]*\.)(?:[.\-]{1,5}[\s/]+){8,}""",
    re.X,
)
ORDERS = (
    {"ignore", "orders"},
    {"reply", "grade", "top"},
    {"reply", "grade", "rate"},
    {"judge", "grade", "top"},
    {"judge", "grade", "reply"},
    {"judge", "reply", "top"},
    {"judge", "rate", "reply"},
    {"judge", "rate", "grade"},
    {"reply", "yes", "asked", "every"},
)
INSULT = re.compile(
    START
    + r"(?:well,? |honestly,? |god,? |oh,? |man,? )?(?:you(?:'re| are) (?:just |such |really |so |an? |being |nothing but |clearly |a complete )*(?:idiot|stupid|moron|loser|pathetic|worthless|dumb|imbecile)\b(?!\s*\?)[^\"\u201c\u201d?]*?(?=[.!,;]|$)"
    r"|(?:just |oh |so )?(?:shut up|go to hell|fuck (?:you|off)|kill yourself)\b(?![\"'\u201d]))",
    re.I | re.M,
)
# Orders to a grader in other languages: what is said of it, by stems without accents, each between word ends; Chinese, Japanese
# and Korean have none. No stem decides alone (`_orders`), and none is in it that everybody says of other things ("at this point").
STEMS = {
    "rate": (
        r"calific\w+|puntu[ae]\w*|valor[ae]\w*|evalu[aeo]\w*|asigna\w*|otorg\w*|dale|denle|notez|evaluez|attribue[rz]?|donne[rz]|accorde[rz]?|bewert\w*|benote\w*"
        r"|vergib|vergeben|valuta\w*|assegn\w+|attribui\w*|avali\w+|atribu\w+|classifi\w+"
        r"|beoorde\w+|geef|ocen\w*|przyzna\w+|wystaw\w*|puanla\w*|degerlendir\w*|betygsatt\w*|bedom\w*|vurder\w*|ohodnot\w*|hodnot\w*|acord\w+|ertekel\w*"
        r"|arvioi\w*|anna|nilai\w*|beri\w*|cham|danh gia|оцен\w+|постав\w+|присво\w+|оціни\w*"
        r"|أعط\w*|اعط\w*|امنح\w*|قيم\w*|ضع|दें|दीजिए|मूल्यांकन",
        "打[^。]{0,2}分|评分|評分|请给|請給|请打|採点|つけて|付けて|与えて|채점|평가해|매겨|주세요|주십시오",
    ),
    "grade": (
        r"puntos|puntuacion\w*|puntaje|(?<!se )nota(?! que)|calificacion\w*|valoracion|estrellas|note|points|etoiles|punkten?|\w*punktzahl|bewertung|sterne"
        r"|\w*note|punti|punteggi\w*|voti|voto|valutazione|stelle|pontos|pontuacao|estrelas|classificacao|avaliacao"
        r"|punten|score|cijfer|beoordeling|sterren|punkty|punktow|punktami|ocen[aey]|gwiazd\w+|puan\w*|notu|yildiz\w*|poang\w*|betyg\w*|karakter\w*|bodu|body"
        r"|znamk\w+|puncte|punctaj\w*|pontsz\w+|pontot|piste\w*|arvosana\w*|skor|nilai|diem"
        r"|балл\w*|оценк\w*|звезд\w*|балів|бали|оцінк\w*|(?:ال)?(?:درج[ةه]|درجات|تقييم\w*|نقاط|نجوم|علام[ةه])|अंक|स्कोर|रेटिंग|सितारे",
        "满分|滿分|高分|评分|評分|打分|分数|分數|得分|[5五]分|[5五]星|満点|最高点|高得点|点数|\\d点|評価|スコア|점수|만점|별점|평점|\\d점",
    ),
    "top": (
        r"maxim\w*|mas alt[ao]s?|mais alt[ao]s?|mejor|perfect\w*|perfekt\w*|cinco|diez|dez|meilleure?s?|plus (?:haute?|elevee?)|parfait\w*|cinq|dix|hochst\w*"
        r"|best\w+|voll\w*|funf|zehn|massim[oaie]|piu alt[oa]|pieno|pieni|cinque|dieci|miglior\w*|hoogst\w*|vijf|tien"
        r"|najwyzsz\w+|maksym\w+|maksim\w+|piec|dziesiec|en yuksek|tam|bes|on|hogst\w*|hoj?est\w*|hoyest\w*|fem|nejvyss\w+|nejlepsi\w*|korkei\w+|tertinggi"
        r"|cao nhat|toi da|высш\w+|наивысш\w+|максимальн\w+|пят\w+|десят\w+|найвищ\w+"
        r"|أعلى|اعلى|(?:ال)?قصوى|(?:ال)?كامل[ةه]?|خمس\w*|عشر\w*|सबसे|सर्वोच्च|उच्चतम|अधिकतम|पूरे|पाँच|पांच|दस|5|10|100",
        "最高|满分|滿分|満点|[5五]分|[5五]星|\\d点|최고|만점|가장 높은|\\d점",
    ),
    "reply": (
        r"respuesta\w*|reponse\w*|antwort\w*|rispost\w+|resposta\w*|antwoord\w*|reactie|odpowied\w+|odpoved\w*|cevap\w*|cevab\w*|yanit\w*|svar\w*|raspuns\w*"
        r"|valasz\w*|vastau\w+|jawaban|balasan|cau tra loi|phan hoi|ответ\w*|відповід\w*"
        r"|(?:ال|لل|بال|ل)?(?:رد|اجاب\w+|إجاب\w+|جواب\w*)|जवाब|उत्तर|प्रतिक्रिया",
        "回答|回复|回覆|回應|回应|答复|返答|返信|応答|答え|답변|응답|대답|답장",
    ),
    "judge": (
        r"juez\w*|evaluador\w*|calificador\w*|juge|evaluateur\w*|correcteur\w*|notateur|richter\w*|bewerter\w*|gutachter\w*|prufer\w*|giudic\w+|valutator\w*"
        r"|juiz\w*|avaliador\w*|rechter|beoordelaar\w*|sedzi\w*|oceniajac\w+|hakem\w*|degerlendirici\w*|domare|dommer"
        r"|rozhodc\w+|soudc\w+|biro|judecator\w*|tuomari\w*|penilai|hakim|giam khao|судь\w+|оценщик\w*|проверяющ\w+|суддя|(?:ال)?(?:قاضي|مقيم|محكم)|न्यायाधीश"
        r"|निर्णायक|मूल्यांकनकर्ता|जज",
        "评委|評委|裁判|评判|评审|評審|评分者|審査|評価者|採点者|심사|평가자|채점자",
    ),
    "orders": (
        r"instruc\w+|consigne\w*|anweisung\w*|instruktion\w*|istruzion\w+|instructie\w*|opdracht\w*|instrukcj\w+|polece\w+|talimat\w*|yonerge\w*|pokyn\w*"
        r"|utasitas\w*|ohje\w*|instruksi\w*|perintah|huong dan|инструкц\w+|указани\w+|інструкц\w+|(?:ال)?(?:تعليمات|أوامر)|निर्देश\w*",
        "指令|指示|命令|지시|명령|지침",
    ),
    "ignore": (
        r"ignor\w+|olvid\w+|oubli\w+|vergiss|vergesst|vergessen|missacht\w+|dimentic\w+|esque\w+|desconsider\w+|negeer\w*|negeren|vergeet|zignoruj\w*|pomin\w*"
        r"|zapomnij\w*|yok say\w*|gormezden|unut\w*|hagyd|unohda|abaikan|bo qua|игнорируй\w*|проигнорируй\w*|забудь\w*|ігноруй\w*|تجاهل\w*|अनदेखा|नज़रअंदाज़|भूल"
        r"|उपेक्षा",
        "忽略|无视|無視|忘记|忘掉|忘れ|무시|잊",
    ),
    "yes": (r"oui|ja|sim|tak|evet|ano|igen|kylla|ya|да|так|نعم|हाँ|हां", "はい|예라고|네라고"),
    "every": (
        r"todas|todos|cada|toutes|tous|chaque|alle|allen|jede\w*|tutte|tutti|ogni|elke|wszystki\w+|kazd\w+|tum|butun|her|alla|varje|все|всех|каждый|кажд\w+|كل"
        r"|جميع|सभी|हर",
        "所有|每个|每個|すべて|全て|모든",
    ),
    "asked": (
        r"preguntas?|questions?|fragen?|domand\w+|pergunt\w+|vra[ag]\w*|pytan\w+|soru\w*|fragor\w*|otazk\w*|вопрос\w*|سؤال|أسئلة|الأسئلة|सवाल\w*|प्रश्न\w*",
        "问题|問題|質問|질문",
    ),
}
LOOKALIKE = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0455\u0458\u0501\u04bb\u051b\u051d\u04cf\u043a\u043c\u0442\u0432\u043d\u0433\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0406\u0405\u0408"  # Cyrillic
    "\u03b1\u03bf\u03c1\u03bd\u03c5\u03b9\u03ba\u03b5\u03c4\u03b7\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7"  # Greek
    "\u1d00\u0299\u1d04\u1d05\u1d07\ua730\u0262\u029c\u026a\u1d0a\u1d0b\u029f\u1d0d\u0274\u1d0f\u1d18\u0280\ua731\u1d1b\u1d1c\u1d20\u1d21\u028f\u1d22\u0251\u0261\u0131\u0142\u00f8\u0111\u00df\u0585\u057d\u0578\u0570\u2019",  # small capitals and the like
    "aeopcyxisjdhqwlkmtbhrABEKMHOPCTYXISJaopvuiketnABEZHIKMNOPTYXabcdefghijklmnoprstuvwyzagilodsounh'",
)
LEET = str.maketrans("0134578@$", "oieastbas")
INVISIBLE = "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e01ef"
MARKS = r"\u0300-\u036f\u0488\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20dc\u20e1-\u20f0"
FLAGS = "\U0001f1e6-\U0001f1ff"  # two make a flag, one is a letter
UNSEEN = re.compile(
    rf"""(?<=[A-Za-z\d])[{INVISIBLE}]+(?=[A-Za-z\d]) | [\u202d\u202e] | [\ufe00-\ufe0f\U000e0100-\U000e01ef]{{2}} | (?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]
    | (?:[^\W_](?:(?<=[A-Za-z\d])[{MARKS}]|[{MARKS}]{{2}}).{{0,20}}){{3}} | (?:(?<![{FLAGS}])[{FLAGS}](?![{FLAGS}]).{{0,5}}){{2}}""",
    re.X | re.S,
)
SPACED = re.compile(r"(?<![^\W_])(?:[^\W_][ .\-_*~|/\u00b7\u2022,]){2,}[^\W_](?![^\W_])")
RUBRIC_WORDS = re.compile(
    r"\b(relevan|empath|persona|fluen|coheren|rubric|criteri|grammatical|harmless|consisten|on.topic|well.written|responsib|safety|likert|alignment)",
    re.I,
)
SPELT = re.compile(
    r"scor|rate|grad|answer|yes|reply|respon|five|ignor|instruc|judge|rubric|stars|highest", re.I
)


def guard(reply: str, said: Sequence[str] = (), known: Sequence[str] = ()) -> str | None:
    """Why a reply gets the lowest score on every criterion, in a few words, or None. `said`: what the person wrote; `known`:
    what else stands before the reply (profile, situation), which is no more to be handed back than the person's own words.

    A reply is decided in milliseconds whatever its length: past LONGEST nothing is read, and no rule is more than linear.
    """
    reply = reply.strip()
    if len(reply) > LONGEST:
        return "too long to be read"
    text = visible(reply)
    words = [word.lower() for word in WORD.findall(text)]
    if not words and not re.search(r"[\u2b50\u2605]", text):
        return "empty"
    theirs = " ".join(said)
    for reading in _readings(text):
        if (
            TO_THE_JUDGE.search(reading)
            or _orders(reading, theirs)
            or len({stem.lower() for stem in RUBRIC_WORDS.findall(reading)}) >= 3
        ):
            return "speaks to the judge"
        if FAKE_TURN.search(reading):
            return "fakes a turn"
    if (MARKUP.search(text) or _signs(text)) and not CODE.search(theirs):
        return "markup"
    if ENCODED.search(text):
        return "encoded"
    if _hides(reply, text, words):
        return "hides letters"
    if INSULT.search(text.translate(LOOKALIKE)):
        return "insult"
    if _echoes(words, [*said, *known]):
        return "echo"
    if _loops(words):
        return "repeats itself"
    if _gibberish(words) or _hollow(reply, words):
        return "gibberish"
    if said and _foreign(text, theirs):
        return "other script"
    return None


def visible(text: str) -> str:
    """The text as it is seen: nothing invisible, no full-width or otherwise dressed-up letters and digits, one space for many."""
    text = unicodedata.normalize("NFKC", text[: 4 * LONGEST])
    out = []
    for c in text:
        kind = unicodedata.category(c)
        if kind in ("Cf", "Me") or re.match(f"[{INVISIBLE}]", c):
            continue
        if "\U0001f1e6" <= c <= "\U0001f1ff":  # flags' letters
            c = chr(ord("A") + ord(c) - 0x1F1E6)
        elif "\U0001f150" <= c <= "\U0001f189":  # white on black
            c = chr(ord("A") + (ord(c) - 0x1F150) % 32) if (ord(c) - 0x1F150) % 32 < 26 else c
        elif kind == "No" and unicodedata.digit(c, None) is not None:
            c = str(unicodedata.digit(c))
        out.append(c)
    text = re.sub(r"\s*\n\s*", "\n", "".join(out)[: 4 * LONGEST])
    return re.sub(r"[^\S\n]{3,}", "  ", text)  # two spaces part the words of a text that is spelt out


def _readings(text: str) -> list[str]:
    """What the letters may stand for: as they are (accents off), and with digits read as letters and spelt words joined."""
    text = re.sub(
        r"(?<=[A-Za-z])[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]+",
        "",
        unicodedata.normalize("NFD", text),
    )
    text = unicodedata.normalize("NFC", text)
    bare = (
        text.translate(LOOKALIKE) if _script(text) in (None, "LATIN") else text
    )  # a Cyrillic letter among Latin ones hides a word
    joined = SPACED.sub(lambda run: re.sub(r"[\W_]", "", run[0]), bare)
    meant = re.sub(
        r"[A-Za-z\d@$]*[A-Za-z][A-Za-z\d@$]*",
        lambda word: word[0].translate(LEET) if re.search(r"[\d@$]", word[0]) else word[0],
        joined,
    )
    out = []
    for reading in (text, bare, meant):
        reading = re.sub(r"[*_~`]+", "", re.sub(r"[^\S\n]+", " ", reading))
        if reading not in out:
            out.append(reading)
    return out


@cache
def _stems() -> dict[str, re.Pattern]:
    return {
        name: re.compile(rf"(?<![^\W\d_])(?:{alphabetic})(?![^\W\d_])|(?:{other})", re.I)
        for name, (alphabetic, other) in STEMS.items()
    }


def _orders(text: str, theirs: str) -> bool:
    """A sentence in another language that tells a grader what to do: three things come together that a reply to a person has
    no reason to join (grade, its height, the reply; a judge; an instruction to drop). What the person spoke of does not count."""
    stems = _stems()
    for sentence in re.split(r"[.!?\n\u3002\u0964;]+", text):
        has = {name for name, stem in stems.items() if stem.search(sentence)}
        if len(has) < 2:
            continue
        has -= {name for name in ("grade", "judge", "orders") if name in has and stems[name].search(theirs)}
        if any(order <= has for order in ORDERS):
            return True
    return False


def _hides(reply: str, text: str, words: list[str]) -> bool:
    """Letters that are there to be read by a program and not by a person: invisible ones inside words, reversed text, words
    of two alphabets, digits for letters, words spelt out."""
    if UNSEEN.search(unicodedata.normalize("NFC", reply)):
        return True
    if re.search(r"[\u202a\u202b\u2066-\u2069]", reply) and not any(
        unicodedata.bidirectional(c) in ("R", "AL") for c in reply
    ):
        return True
    latin = _script(text) in (None, "LATIN")
    for word in WORD.findall(text):
        if not word.isascii() and re.search(r"[A-Za-z]", word):
            kinds = [
                "L" if c.isascii() else unicodedata.name(c, "?").split()[0][0] for c in word if c.isalpha()
            ]
            other = {unicodedata.name(c, "?").split()[0] for c in word if c.isalpha() and not c.isascii()} & {
                "CYRILLIC",
                "GREEK",
                "ARMENIAN",
                "CHEROKEE",
                "COPTIC",
                "LISU",
            }
            switches = sum(a != b for a, b in zip(kinds, kinds[1:]))
            if (
                other
                and len(kinds) > 3
                and (switches > 1 or latin)
                and not re.fullmatch(r"\d*[\u03bc\u03c9\u03c0]\w{1,3}", word)
            ):
                return True
    spelt = [run[0] for run in SPACED.finditer(text)]
    if len(SPELT.findall(re.sub(r"[\W_]", "", " ".join(spelt)))) >= 2:
        return True
    return (
        len({word for word in words if len(re.findall(r"[a-z](?=[013457])|[013457](?=[a-z])", word)) >= 2})
        >= 3
    )  # th1s


def _echoes(words: list[str], said: Sequence[str]) -> bool:
    """More than half of its word pairs are the person's own, or a whole passage is: a likelihood would love it. (Of 532 good
    replies none goes over a third or seven words in a row, of 16 written as echoes 12 go over a half.)"""
    theirs, passages = set(), set()
    long = len(words) >= COPIED
    for text in said:
        spoken = [word.lower() for word in WORD.findall(text)]
        theirs |= set(zip(spoken, spoken[1:]))
        passages |= {tuple(spoken[i : i + COPIED]) for i in range(len(spoken) - COPIED + 1) if long}
    pairs = list(zip(words, words[1:]))
    return (
        len(words) >= 10
        and sum(pair in theirs for pair in pairs) > 0.5 * len(pairs)
        or any(tuple(words[i : i + COPIED]) in passages for i in range(len(words) - COPIED + 1))
    )


def _loops(words: list[str]) -> bool:
    """A long reply that is mostly one four-word run over and over, or of very few words."""
    if len(words) < 15:
        return False
    count = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3)).most_common(1)[0][1]
    return (count >= 3 and 4 * count > 0.6 * len(words)) or len(set(words)) < 0.3 * len(words)


def _gibberish(words: list[str]) -> bool:
    """Mostly words that nobody could say: no vowel in four letters and more, or six consonants in a row (Latin letters only)."""
    latin = [word for word in words if re.fullmatch(r"[a-z]{4,}", word)]
    odd = [
        word
        for word in latin
        if not re.search(r"[aeiouy]", word) or re.search(r"[bcdfghjklmnpqrstvwxz]{6,}", word)
    ]
    return len(latin) >= 3 and len(odd) > 0.4 * len(latin)


def _hollow(reply: str, words: list[str]) -> bool:
    """More signs and blanks than letters, and many of them: padding moves the words away from the question that is asked about them."""
    letters = sum(c.isalnum() or unicodedata.category(c)[0] == "M" for c in reply)
    return len(reply) - letters - len(words) > max(60, letters)


def _signs(text: str) -> bool:
    """As many brackets, bars and slashes as only a program's text has (a web address may have them)."""
    text = URL.sub("", text)
    return len(SIGNS.findall(text)) > max(6, 0.03 * len(text))


def _scripts(text: str) -> Counter:
    """How many letters of each script; Chinese signs and Japanese kana count as one."""
    names = (unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    return Counter("CJK" if name in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else name for name in names)


def _script(text: str) -> str | None:
    """The script most of a text's letters belong to (LATIN, CYRILLIC, CJK, ..); None for fewer than eight letters."""
    count = _scripts(text)
    if count.total() < 8:
        return None
    name, n = count.most_common(1)[0]
    return name if n > 0.6 * count.total() else None


def _foreign(text: str, theirs: str) -> bool:
    """Mostly in another script than the person writes, or more than a phrase in one that the person never used (a phrase:
    24 letters of an alphabet, 8 signs of Chinese, Japanese or Korean)."""
    mine, other = _script(text), _script(theirs)
    if mine and other and mine != other:
        return True
    used = _scripts(theirs)
    return other is not None and any(
        n > (8 if name in ("CJK", "HANGUL") else 24)
        for name, n in _scripts(text).items()
        if name not in used and name != "LATIN"
    )
