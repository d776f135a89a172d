"""Tables of labels as they are handed around: CSV files -> the cells of the manifest.

docs/sources.md says what cells and columns mean, and CELL_WORDS lists the words. Anything else is
a DataError that names file, row and column.
"""
import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO, cast
from unicodedata import category, normalize

from common import DataError, open_text

# What the manifest has -> what a cell says, in the form of `bare`. Numbers are not listed.
CELL_WORDS = {
    "1": ("yes", "y", "true", "t", "positive", "pos", "present", "detected", "seen", "found",
          "checked", "+", "(+)", "+ve", "✓", "✔", "☑", "✅", "ja", "oui", "si", "sí", "sim",
          "tak", "ano", "evet", "kyllä", "jah", "taip", "igen", "da", "ya", "ναι", "wahr", "vrai",
          "verdadero", "verdadeiro", "vero", "waar", "positiv", "positif", "positivo", "да", "是",
          "有", "阳性", "陽性", "はい", "あり",
          # Words in other scripts, and "present" in all these languages.
          *("áno jā так có exists confirmed reactive presente presentes presenti présent présente "
            "prezent prezentă vorhanden nachgewiesen aanwezig obecny obecna obecne přítomen "
            "přítomna přítomno přítomný var mevcut pozitif pozitív pozitivní pozytywny van ada "
            "есть имеется присутствует выявлено обнаружено положительный положительно υπάρχει "
            "θετικό θετικός 存在 有り 예 네 유 있음 양성 نعم موجود إيجابي بله دارد כן קיים חיובי "
            "हाँ हां ใช่ มี พบ").split()),
    "0": ("no", "n", "false", "f", "negative", "neg", "absent", "not detected", "not seen",
          "not found", "unchecked", "(-)", "-ve", "✗", "✘", "☐", "❌", "nein", "non", "nao",
          "não", "nie", "ne", "nu", "hayır", "hayir", "ei", "nem", "tidak", "όχι", "falsch",
          "faux", "falso", "onwaar", "negativ", "negatif", "négatif", "negativo", "нет", "否",
          "无", "無", "阴性", "陰性", "いいえ", "なし",
          *("nee nej nei nē ні không nonreactive ausente ausentes assente assenti absente absentă "
            "fehlend fehlt afwezig nieobecny nieobecna nieobecne nepřítomen nepřítomna nepřítomno "
            "nepřítomný yok negatív negativní negatywny nincs οχι отсутствует отрицательный "
            "отрицательно αρνητικό αρνητικός 没有 不是 不存在 無し 아니요 아니오 무 없음 음성 لا "
            "سلبي خیر ندارد לא שלילי नहीं ไม่ ไม่ใช่ ไม่มี ไม่พบ").split(),
          "non-reactive", "non reactive", "ruled out", "nicht vorhanden", "nicht nachgewiesen",
          "non présent", "non présente", "no presente", "não presente", "non presente",
          "niet aanwezig", "mevcut değil", "nincs jelen", "tidak ada", "не выявлено",
          "не обнаружено", "δεν υπάρχει", "غير موجود", "לא קיים"),
    "-1": ("uncertain", "u", "maybe", "unsure", "possible", "equivocal", "indeterminate"),
    "": ("", "nan", "nat", "none", "nil", "null", "n/a", "na", "n.a", "n.d", "n/r", "n.r", "nr",
         "#n/a", "<na>", r"\n", "-", "--", ".", "..", "...", "missing", "empty", "blank",
         "undefined", "pending", "tbd", "unk", "unknown", "?")}
# Phrases that also mean "": not available, no data.
NOTHING = re.compile(
    "(not|no) (answer|applicable|assessed|available|data|done|evaluated|given|info|information"
    "|known|mentioned|performed|record|recorded|reported|result|specified|stated|tested|value)")
# The words for "" that programs write for an empty cell. In a column of classes the others may be
# classes: none, mild, severe.
OPEN = ("", "nan", "nat", "null", "#n/a", "<na>", r"\n")
# A value that is also an English prefix. It is a value only in a column without other words.
PREFIX = "non"
VALUES = {normalize("NFKC", word): value for value, words in CELL_WORDS.items() for word in words}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII)
DASHES = re.compile("[\u2010-\u2015\u2212]")      # hyphens, en and em dashes, the minus sign
QUOTES = "'\"`«»‘’‚‛“”„‟‹›"
# A number and what it means, in either order: 1 (yes), 1=y, 1 - present, yes (1).
MEANING = re.compile(r"([+-]?[0-9]|99)(?:[ :.,)-]+(?=\w\w)|\s*[=:(]\s*)([^\W\d].*?)\)?"
                     r"|([^\W\d].*?)\s*[=:(]\s*([+-]?[01])\)?")
# Labels with an answer, a sign or a number: Mass (yes), Mass:0.9, Mass+ Nodule-, 1. Mass.
ANSWER = re.compile(r".*[^\s-]\s*([:=(\[{@→]| - (?=\D))\s*(?P<answer>.+?)[)\]}]?")
SHARE = re.compile(r"[+-]?(\d*\.\d+%?|\d+%)")
SIGN = re.compile(r"\w([+-](?=[\s,;|]|$)| [+-](?=\s*([,;|]|$)))")
SIGN_BEFORE = re.compile(r"(\([-+¬!~]\)|[-+¬!~])\s*[^\W\d].*", re.DOTALL)      # -Nodule, (-) Mass
NUMBERED = re.compile(r"\(?(\d+[.)]|[a-z]\)|[ivx]{2,}[.)])\s*[^\W\d].*", re.IGNORECASE)
# Words that make a finding uncertain: suspected Mass, r/o Mass, Mass (possible).
DOUBTED = re.compile(
    r"[\s(,:]*(?<!\w)(r/o|rule out|possibl[ey]|probabl[ey]|likely|suspect(ed)?|suspicio(n|us)"
    r"|suggestive|questionable|questioned|query|presum(ed|ptive)|uncertain|unsure|maybe|equivocal"
    r"|indeterminate|doubtful|potential|(cannot|can't) exclude|(v\.? ?a\.?|verdacht auf|fraglich)"
    r"|posible|poss[ií]vel|prov[aá]vel|suspeita|sospecha)(?!\w)( (of|for|de))?[\s),:]*")
LONGEST_ANSWER = 100            # characters; a longer cell is a report
LONGEST_LIST = 2_000            # a longer list of findings and answers is a report
# Cells that have letters but are no class, by what to call them.
MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}"
NO_CLASS = {
    "a date": re.compile(r"\d{1,4}[-/. ]?[a-z]{3,9}[-/. ,]*\d{2,4}"
                         rf"|\d\d?[-/. ]{MONTH}|{MONTH}[-/. ]\d\d", re.IGNORECASE),
    "an error of a spreadsheet": re.compile(r"#[A-Z0-9/]+[!?]", re.IGNORECASE),
    "a formula of a spreadsheet": re.compile(r"=.*"),
    "damaged by zero bytes": re.compile(r".*\0.*", re.DOTALL),
    "a file": re.compile(r".*\.(png|jpe?g|tiff?|dcm|bmp|jp2|webp|pgm|gif)", re.IGNORECASE),
    "HTML": re.compile(r".*(&#?\w{2,6};|<\w+>).*", re.DOTALL)}
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)

# Lists: what separates their words, and what may surround them.
SEPARATORS = "|;"
LINE_ENDS = "\n\t\r\v\f\x85\u2028\u2029"
# Commas and the like of all scripts, bars, line ends; or the gap between two words in quotes.
LIST_MARKS = re.compile("[,|;\uff0c\uff1b\uff5c\u3001\u060c\u061b\u055d\u07f8\u1363\u1364\u1802"
                        "\u1808\ua4fe\ua60d\ua6f5\ufe50\ufe51\ufe54\uff64\u30fb\uff65\u00a6\u2016"
                        "\u2223\u2502\u01c0"
                        rf"{LINE_ENDS}]|[\"'”’»]\s+[\"'“‘«]")
GAP = re.compile(r"\w(\s{2,}|[\u2001\u2003\u3000])\w")      # more than one blank between two words
COMBINED = re.compile(r"[^\W\d]\s*([&+/]|\b(and|und|et|y|e|with(out)?)\b)\s*[^\W\d]", re.IGNORECASE)
MARKS = {"Po", "Ps", "Pe", "Sm", "Sc", "Sk", "So"}      # Unicode categories that may separate
NO_MARKS = {*QUOTES, *"().%_"}      # these never separate, and neither do dashes
LONGEST_RUN = 5                 # words; in other names, no longer ones are searched for
ICD = re.compile(r"[A-Za-z]\d\d(\.\d+)?")
BRACKETS = {"[": "]", "(": ")", "{": "}"}
QUOTED = re.compile(r"(?<!\w)b?'([^']*)'|(?<!\w)b?\"([^\"]*)\"")
# Bytes as NumPy writes them: b'Mass'.
BYTES = re.compile(r"b('[^']*'|\"[^\"]*\")")

# Words that show that a name is a finding, and not a person or an answer.
FINDINGS = re.compile(
    "normal|healthy|finding|disease|covid|pneumo|bacteri|vir(al|us)|tubercul|tumou?r|cancer|malign"
    "|benign|nodul|mass|effusion|edema|oedema|fibro|emphysem|atelecta|cardi|consolid|infiltr|opaci"
    "|lesion|fractur|hernia|pleura|thick|device|lung|thora|sars|mers|flu|posit|negat|control|case"
    "|class|label|grade|stage|mild|moder|sever|none|other|sick|train|test|valid|patholog|view"
    r"|lateral|front|\b(left|right|both|upper|lower|acute|chronic)\b"
    "|正常|[异異]常|良性|[恶悪惡]性|健康|感染|[肺胸心骨炎癌瘤病症肿腫]|[阴陰]影|积水|[结結][核节節]"
    "|정상|이상|악성|[폐암염]|결핵|종양|질환|طبيع|طبیع|سليم|سالم|سل|كتل|عقد|التهاب|ورم|حميد|خبيث"
    "|مرض|بیمار|תקי|בריא|חולה|דלקת|שחפת|גידול|שפיר|ממאיר|सामान्य|रोग|क्षय|ปกติ|โรค|ปอด|มะเร็ง")
VOWELS = "aeiouyáéíóúàèìòùâêîôûãõäöüåıаеёиоуыэюяіїәөүαεηιουωάέήίόύώ"
SPOKEN = re.compile(                # matches var and yok, but not tb or copd
    rf"(?=.*[{VOWELS}])[^{VOWELS}]?([{VOWELS}]+[^{VOWELS}])*[{VOWELS}]*")

MOST_CELLS = 100_000_000        # images times labels that fit into memory

# The line that Excel puts before the header; and first bytes of files that are no CSV.
SEP_LINE = re.compile(r'"?sep=.?"?\s*', re.IGNORECASE)
OTHER_TABLES = {b"PK\3\4": "an Excel workbook or a zip file",
                b"\xd0\xcf\x11\xe0": "an Excel workbook", b"PAR1": "a Parquet file",
                b"SQLite": "a database", b"\x89HDF": "an HDF5 file", b"ARROW1": "an Arrow file",
                b"FEA1": "a Feather file", b"\x93NUMPY": "a NumPy file", b"\x80\4": "a pickle",
                b"<stata_dta": "a Stata file", b"$FL2": "an SPSS file", b"%PDF": "a PDF",
                b"{\\rtf": "an RTF document", b"\x89PNG": "an image", b"\xff\xd8": "an image",
                b"BZh9": "packed by bzip2", b"\xfd7zXZ": "packed by xz", b"7z\xbc\xaf": "a 7z file",
                b"(\xb5/\xfd": "packed by zstd", b"Rar!": "a RAR file"}
# Other files, by the start of their text.
OTHER_TEXTS = {"JSON": re.compile(r"\s*[\[{]\s*([\[{]|\"[^\"]*\"\s*[:,\]])"),
               "a page of HTML or XML": re.compile(
                   r"\s*<(!|\?xml|html|head|body|meta|style|table|div|script)", re.IGNORECASE),
               "a web archive": re.compile(r"MIME-Version:", re.IGNORECASE),
               "a tar file": re.compile(r".{257}ustar", re.DOTALL)}
# In English text as UTF-16, every other byte is zero.
WIDE_TEXT = re.compile(r"(\0{1,3}[^\0]){2}|([^\0]\0{1,3}){2}")
SAVE_AS_CSV = ": save its table as CSV in UTF-8"


# --------------------------------------------------------------------------------------------------
# Reading.

class Row(NamedTuple):
    """A line of a CSV file; the header is row 1."""
    number: int
    cells: list[str]                # one for each of Table.columns


@dataclass(frozen=True)
class Table:
    """The requested columns of a CSV file, and its rows by their key."""
    file: Path
    columns: list[str]              # without the key's column
    rows: dict[str, Row]            # by the cell of the key's column
    header: list[str]               # all columns of the file
    further: dict[str, list[Row]] = field(default_factory=dict)     # the rows after a key's first

    def column(self, name: str) -> dict[str, str]:
        """{key: cell} of one column, from each key's first row.

        {} if the column was optional and is missing."""
        if name not in self.columns:
            return {}
        place = self.columns.index(name)
        return {key: row.cells[place] for key, row in self.rows.items()}

    def all_rows(self, key: str) -> list[Row]:
        """All rows of a key, in their order."""
        return [self.rows[key], *self.further.get(key, ())]


def read_table(file: Path, key: str, columns: list[str] | None = None,
               optional: Collection[str] = (), normalise: Callable[[str], str] = str,
               several: bool = False, hint: str = "", flag: str = "") -> Table:
    """Read a CSV file, which may be compressed by gzip; its rows are named by the column `key`.

    columns: those to read. None reads all but `key` and the column without a name, in which
    programs number the rows. `optional` columns may be missing. normalise: applied to each key.
    several: whether a key may have several rows. hint: ends the message if a key must not. flag:
    the flag that names another key.

    Commas, semicolons, tabs or | separate the cells. A byte-order mark, CRLF, blanks around a cell,
    and what spreadsheets add (a first line `sep=;`, cells such as ="007") do not matter. DataError
    names file, row and column if a column is missing, a row has another length than the header, or
    a key comes twice."""
    rows, further, number, first = {}, {}, 0, 1
    csv.field_size_limit(2**31 - 1)     # a cell may hold a report, or the outline of a mask
    try:
        with open_text(file) as f:
            refuse_other_files(file, f)
            # Byte-order marks also come in the middle, where files were joined.
            texts = (line.lstrip("\ufeff") for line in f)
            head = next(texts, "")
            if SEP_LINE.fullmatch(head):
                first, head = 2, next(texts, "")
            # strict: a quote that is never closed is an error.
            lines = csv.reader(chain([head], texts), strict=True, delimiter=delimiter_of(head, key))

            # The header gives the place of each column.
            header = [name.strip() for name in next(lines, [])]
            twice = next((name for name in header if name and header.count(name) > 1), "")
            if twice:
                one, other = [n for n, name in enumerate(header, 1) if name == twice][:2]
                raise DataError(f"{file} must have one column {twice!r}, and columns {one} and "
                                f"{other} are called so: rename one of them")
            if columns is None:
                columns = [name for name in header if name not in (key, "")]
            for name in (key, *columns):
                if header.count(name) != 1 and (name in header or name not in optional):
                    ask = f"; {flag} names another" if flag and name == key else ""
                    raise DataError(f"{file} must have one column {name!r}, "
                                    f"its header is {','.join(header)[:500]!r}{ask}")
            columns = [name for name in columns if name in header]      # without optional ones
            places = [header.index(name) for name in (key, *columns)]

            # The rows, by their keys.
            for number, line in enumerate(lines, first + 1):
                if not any(map(str.strip, line)):       # a blank line, or only commas
                    continue
                if len(line) != len(header):
                    raise DataError(f"{file}, row {number}: {len(line)} cells where the header "
                                    f"has {len(header)}")
                # Most columns repeat a few words: interning keeps each in memory once.
                value, *cells = [sys.intern(plain_cell(line[place])) for place in places]
                if not value:
                    raise DataError(f"{file}, row {number}: its key is empty (column {key})")
                value = normalise(value)
                row = Row(number, cells)
                if rows.setdefault(value, row) is row:
                    continue
                if not several:
                    raise DataError(f"{file}, row {number}, column {key}: {value} is already in "
                                    f"row {rows[value].number}{hint}")
                further.setdefault(value, []).append(row)
    except (UnicodeError, EOFError, OSError, csv.Error) as error:
        if isinstance(error, OSError) and error.filename:               # it cannot be opened
            raise
        raise DataError(f"{file} is not a CSV file in UTF-8 ({csv_fault(number, error)})"
                        f"{SAVE_AS_CSV if isinstance(error, UnicodeError) else ''}") from None
    return Table(file, columns, rows, header, further)


def refuse_other_files(file: Path, f: TextIO) -> None:
    """DataError if f begins like a table that is no CSV file. f stays where it is."""
    head = cast(BufferedReader, f.buffer).peek(600)[:600]
    text = head.decode(f.encoding, "ignore").lstrip("\ufeff")
    kinds = [kind for start, kind in OTHER_TABLES.items() if head.startswith(start)]
    kinds += [kind for kind, start in OTHER_TEXTS.items() if start.match(text)]
    if WIDE_TEXT.match(text):
        raise DataError(f"{file} is not a CSV file in UTF-8 (it is in UTF-32, or in UTF-16 without "
                        f"a byte-order mark){SAVE_AS_CSV}")
    if kinds:
        raise DataError(f"{file} is {kinds[0]}, and no CSV file{SAVE_AS_CSV}")


def plain_cell(text: str) -> str:
    """A cell without the blanks around it, without the ="…" that tells a spreadsheet that 007 is
    text, and without NumPy's b'…'."""
    text = text.strip()
    if BYTES.fullmatch(text):
        return text[2:-1].strip()
    return text[2:-1].strip() if text.startswith('="') and text.endswith('"') else text


def csv_fault(number: int, error: Exception) -> str:
    """What is wrong with a table. number: the last row that could be read."""
    if not isinstance(error, csv.Error):
        return str(error)
    quote = ", as a quote that opens there is never closed"
    return f"row {max(number, 1) + 1}: {error}{quote if 'end of data' in str(error) else ''}"


def delimiter_of(first_line: str, key: str) -> str:
    """The separator of a table's cells. first_line: the header, which must have the name `key`."""
    for mark in ",;\t|":
        if key in [name.strip() for name in next(csv.reader([first_line], delimiter=mark), [])]:
            return mark
    return ","


# --------------------------------------------------------------------------------------------------
# Labels.

@dataclass(frozen=True)
class LabelRules:
    """What the user has decided about the label columns of a table."""
    class_columns: tuple[str, ...] = ()     # their cells name classes, whatever they look like
    not_mentioned: tuple[str, ...] | None = None    # their words for "not mentioned"; None: OPEN
    separator: str = ""             # of lists; "": found by itself; "none": no cell is a list
    several_rows: str = ""          # any or majority: how the rows of one key become one
    rater_column: str = ""          # rows with equal key and rater are one opinion
    many_classes: bool = False      # may a column have more than the images can teach?
    letters: bool = False           # may y or n be in a column with t or f?
    flags: bool = True              # may messages name the flags for all this?


class Labels(NamedTuple):
    """What the label columns of a table say."""
    names: list[str]                            # L label names of the manifest
    cells: dict[str, tuple[str, ...]]           # L cells of the manifest, by key
    notes: list[str]                            # sentences for the user


class Column(NamedTuple):
    """What one column means."""
    names: list[str]                            # of its labels
    cells: dict[str, tuple[str, ...]]           # the labels' cells for each cell of it
    note: str                                   # what the user should know


def read_labels(table: Table, names: list[str], several_rows: str = "", rater_column: str = "",
                hint: str = "", shown: bool = True) -> Labels:
    """Columns `names` of a table as labels, from all rows.

    They must hold values: DataError names row and column of the first cell that is none, and ends
    with `hint`. Words are not taken for lists. shown: whether the message shows the cell, which may
    be a person's name."""
    rules = LabelRules(separator="none", several_rows=several_rows, rater_column=rater_column,
                       many_classes=True, flags=False)
    labels = understand(table, names, list(table.rows), rules)
    if labels.names != names:
        number, name, cell = next(
            (row.number, name, row.cells[table.columns.index(name)]) for name in names
            for key in table.rows for row in table.all_rows(key)
            if value_of(row.cells[table.columns.index(name)]) is None)
        says = f"holds {cell!r}" if shown else "does not"
        raise DataError(f"{table.file} must hold 1, 0, -1 or blanks: row {number}, column {name}, "
                        f"{says}{hint}")
    return labels


def understand(table: Table, names: list[str], keys: list[str], rules: LabelRules) -> Labels:
    """Columns `names` of a table as labels, from the rows of `keys`.

    DataError names file, row and column of a cell that is neither a value nor a class."""
    several = len(names) > 1
    shared = shared_words(table, names, keys) if several and rules.flags else {}
    columns = [understand_column(table, name, keys, rules, several, shared.get(name, set()))
               for name in names]
    label_names = [label for column in columns for label in column.names]
    places = [table.columns.index(name) for name in names]
    rater = table.columns.index(rules.rater_column) if rules.rater_column else None

    cells: dict[str, tuple[str, ...]] = {}
    for key in keys:
        # Each row is a vote; with a rater column, each rater has one, any_of that rater's rows.
        opinions: dict[str | int, tuple[str, ...]] = {}
        for row in table.all_rows(key):
            said = columns[0].cells[row.cells[places[0]]] if columns else ()
            for place, column in zip(places[1:], columns[1:]):
                said += column.cells[row.cells[place]]
            who = row.number if rater is None else row.cells[rater]
            if isinstance(who, str) and value_of(who) == "":        # all would be one reader
                raise DataError(f"{table.file}, row {row.number}, column {rules.rater_column}: "
                                f"{who!r} names no reader")
            opinions[who] = any_of([opinions[who], said]) if who in opinions else said
        together = any_of if rules.several_rows == "any" else majority_of
        cells[key] = together(list(opinions.values()))
    return Labels(label_names, cells, [column.note for column in columns if column.note])


def any_of(opinions: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Present if any opinion says so, else uncertain, else absent, else not mentioned."""
    if len(opinions) == 1:
        return opinions[0]
    return tuple(next((value for value in ("1", "-1", "0") if value in votes), "")
                 for votes in zip(*opinions))


def majority_of(opinions: list[tuple[str, ...]]) -> tuple[str, ...]:
    """What more than half of the opinions say; uncertain if there is no such majority.

    "Not mentioned" is an opinion, too: a finding that one of three readers names and two pass over
    is not mentioned."""
    if len(opinions) == 1:
        return opinions[0]
    cells = []
    for votes in zip(*opinions):
        value, count = Counter(votes).most_common(1)[0]
        cells.append(value if 2 * count > len(votes) else "-1")
    return tuple(cells)


def understand_column(table: Table, name: str, keys: list[str], rules: LabelRules,
                      prefix: bool, shared: set[str]) -> Column:
    """One column as a label, or as one label for each of its words.

    prefix: whether the labels begin with the column's name, so that equal words of two columns stay
    two labels. shared: the words that are also in other columns, see shared_words."""
    # The cells, how often each occurs, and the first row that has it.
    place = table.columns.index(name)
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for key in keys:
        for row in table.all_rows(key):
            counts[row.cells[place]] += 1
            first.setdefault(row.cells[place], row.number)
    where = {cell: f"{table.file}, row {row}, column {name}" for cell, row in first.items()}

    # A column holds values or words. Both together are an error.
    classes = name in rules.class_columns
    meaning = partial(class_meaning, rules=rules) if classes else value_of
    values = {cell: meaning(cell) for cell in counts}
    if not classes:
        if "+" in counts:               # with + for present, a dash means absent
            values |= {cell: "0" for cell in counts if DASHES.sub("-", cell) == "-"}
        if None in values.values():     # "non" beside other words, such as "covid", is a word
            values |= {cell: None for cell in counts if bare(cell) == PREFIX}
        refuse_letters_of_two_kinds(where, rules)
    if classes and rules.not_mentioned is None:
        refuse_what_may_be_a_class(where)
    words = [cell for cell, value in values.items() if value is None]
    open_note = not_mentioned_note(name, counts, values)
    value_note = values_note(name, counts, values)
    if not words:
        return Column([name], {cell: (value or "",) for cell, value in values.items()},
                      f"{value_note} {open_note}".strip())
    if not classes:
        refuse_what_is_no_class(values, where, words, rules)
    lists = read_lists(words, where, rules, meaning)

    # Words that differ only in form are one class.
    spelling = spellings(Counter({
        (cell, part): counts[cell] for cell, parts in lists.items() for part in parts}))
    labels = sorted(set(spelling.values()))
    if not classes:
        refuse_uncertain_findings(labels, lists, where, rules)
    has_lists = any(len(parts) > 1 for parts in lists.values())
    if not classes and not has_lists:
        refuse_answers_of_other_languages(labels, where, shared, rules)
    check_number_of_classes(table, name, len(labels), len(keys),
                            has_lists or bool(rules.several_rows), rules)
    index = {label: i for i, label in enumerate(labels)}
    cells: dict[str, tuple[str, ...]] = {cell: ("",) * len(labels) for cell in counts}
    for cell, parts in lists.items():
        present = {index[spelling[part]] for part in parts}
        if present:
            cells[cell] = tuple("1" if i in present else "0" for i in range(len(labels)))

    # A label must not be a bare number or value.
    if prefix or any(value_of(label) is not None or NUMBER.fullmatch(label) for label in labels):
        labels = [f"{name} {label}" for label in labels]
    kind = "lists of classes" if has_lists else "classes"
    count = f"{len(labels):,} label{'s' if len(labels) > 1 else ''}"
    note = f"Column {name} holds {kind}: {count}.{merged(spelling)}"
    combined = [label for label in index if COMBINED.search(label)]
    if combined and rules.flags and not (classes or has_lists or rules.separator):
        note += (f" One class, and no list, is {combined[0]!r}: --label-separator says what "
                 "separates the words of a list.")
    return Column(labels, cells, f"{note} {open_note}".strip())


@lru_cache(maxsize=2**16)
def value_of(cell: str) -> str | None:
    """The manifest's 1, 0, -1 or "" for a cell; None if the cell is no value of a label.

    Brackets, a spreadsheet's =TRUE(), and a number beside the word that explains it, as in 1 (yes)
    or 2=no, do not matter. 1=no is no value, because the two contradict each other."""
    text = bare(cell)
    value = value_of_word(text)
    if value is not None or len(text) > LONGEST_ANSWER:
        return value
    call = re.fullmatch(r"=(\w+)\(\)", text)
    if call or BRACKETS.get(text[0]) == text[-1]:
        inner = bare(call[1] if call else text[1:-1])
        # A spreadsheet writes (1) for -1; [] and [nan] are lists of nothing.
        return None if NUMBER.fullmatch(inner) and text[0] == "(" else value_of_word(inner) or None
    meaning = MEANING.fullmatch(text)
    if not meaning:
        return None
    number, word = (meaning[1], meaning[2]) if meaning[1] else (meaning[4], meaning[3])
    value = VALUES.get(bare(word))
    return value if value_of_word(number) in (None, value) else None


def value_of_word(text: str) -> str | None:
    """value_of for a number or a word in the form of `bare`."""
    if NUMBER.fullmatch(text):
        return {1.0: "1", 0.0: "0", -1.0: "-1"}.get(float(text))
    text = text.replace("i\u0307", "i")      # Turkish capital I with a dot, in small letters
    return "" if NOTHING.fullmatch(text) else VALUES.get(text)


def class_meaning(cell: str, rules: LabelRules) -> str | None:
    """Empty if a cell in a column of classes says nothing; None if it is a class."""
    words = OPEN if rules.not_mentioned is None else ("", *rules.not_mentioned)
    return "" if form_key(cell) in map(form_key, words) else None


def refuse_what_may_be_a_class(where: dict[str, str]) -> None:
    """DataError for a cell in a column of classes that may be a class, or say that none is known.

    where: file, row and column of each cell."""
    for cell in where:
        if value_of(cell) == "" and form_key(cell) not in map(form_key, OPEN):
            raise DataError(f"{where[cell]}: {cell!r} may be a class, or say that none is known: "
                            "--not-mentioned is followed by the words that say this, and by no "
                            "word where all of them are classes")


def not_mentioned_note(name: str, counts: Counter, values: dict[str, str | None]) -> str:
    """A sentence on the words of a column that count as not mentioned, if there are any."""
    words = sorted(cell for cell, value in values.items() if value == "" and cell)
    if not words:
        return ""
    count, shown = sum(counts[word] for word in words), ", ".join(map(repr, words[:5]))
    return f"Not mentioned in column {name}: {count:,} cells that say {shown}."


def values_note(name: str, counts: Counter, values: dict[str, str | None]) -> str:
    """A sentence on the words of a column that were read as values, and how often, or "":
    `Column dx: N read as 0 (3), T as 1 (4).`"""
    words = sorted(cell for cell, value in values.items()
                   if value and not NUMBER.fullmatch(bare(cell)))
    texts = [f"{word} {'as' if i else 'read as'} {values[word]} ({counts[word]:,})"
             for i, word in enumerate(words[:8])]
    more = f", and {len(words) - 8:,} more words" if len(words) > 8 else ""
    return f"Column {name}: {', '.join(texts)}{more}." if words else ""


def refuse_letters_of_two_kinds(where: dict[str, str], rules: LabelRules) -> None:
    """DataError for a column of letters such as N, F and T, which may be normal, fibrosis, TB.

    Values would be one pair only: y and n, or t and f."""
    pairs = [[cell for cell in where if bare(cell) in pair]
             for pair in (("y", "n"), ("t", "f"))]
    if all(pairs) and not rules.letters:
        one, other = pairs[0][0], pairs[1][0]
        ask = ("; --class-columns takes every cell for the name of a class, --allow "
               "mixed-letters these for values" if rules.flags else "")
        raise DataError(f"{where[other]}: {other!r} beside {one!r}, which are letters of two kinds "
                        f"(y, n; t, f) and may be names: {one!r} would be {value_of(one)}, "
                        f"{other!r} {value_of(other)}{ask}")


def refuse_what_is_no_class(values: dict[str, str | None], where: dict[str, str],
                            words: list[str], rules: LabelRules) -> None:
    """DataError for a word among values, or for a number that is no value.

    values: the meaning of each cell, None for a word. where: file, row and column of each cell."""
    ask = "; --class-columns takes every cell for the name of a class" if rules.flags else ""
    for word in words:
        if DECIMAL_COMMA.fullmatch(word) and not rules.separator:
            raise DataError(f"{where[word]}: {word!r} may be a number with a decimal comma: write "
                            f"it with a point{ask}")
    others = [cell for cell, value in values.items() if value]
    if others:
        raise DataError(f"{where[words[0]]}: {words[0]!r} among values of 1, 0, -1 and blank, "
                        f"such as {others[0]!r}{ask}")
    for word in words if rules.flags and rules.separator != "none" else ():
        kind = what_is_no_class(word, rules.separator)
        if kind and not NUMBER.fullmatch(word.strip('=%"')):
            raise DataError(f"{where[word]}: {word!r} seems to be {kind}, and no class{ask}")
    for word in words if rules.flags else ():
        if NUMBER.fullmatch(word.casefold().strip('=%"')):      # 100%, or ="1" from Excel
            raise DataError(f"{where[word]}: the number {word!r} is none of 1, 0, -1{ask}")


def what_is_no_class(word: str, separator: str) -> str:
    """What a word of a column seems to be if it is neither a class nor a list of classes; "" if it
    may be one. separator: of lists, if the user gives it."""
    kind = next((kind for kind, form in NO_CLASS.items() if form.fullmatch(word)), "")
    is_list = any(mark in word for mark in (*SEPARATORS, separator) if mark)
    if kind or len(word) > (LONGEST_LIST if is_list else LONGEST_ANSWER):
        return kind
    if is_garbled(word):
        return "damaged by a wrong decoding"
    if not any(map(str.isalpha, word)):
        empty = not word.strip(f"[](){{}}|;, {QUOTES}")                    # an empty list
        mark = "" if empty else "a mark"
        return "a range, a date or other numbers" if re.search(r"\d", word) else mark
    parts = [part.strip(f" []{{}}{QUOTES}")
             for part in re.split(rf"[|;,\n]|{re.escape(separator or '|')}", word)]
    answers = [answer["answer"] for answer in map(ANSWER.fullmatch, parts) if answer]
    for answer in answers:
        if value_of(answer) or SHARE.fullmatch(answer):
            return f"a finding and its {'number' if answer[-1] in '0123456789%.' else 'answer'}"
    first = re.match(r"(\w\w+)\s*([:=(\[{]| - )", bare(word))
    if first and VALUES.get(first[1]):
        return "an answer and a remark"
    if len(SIGN.findall(small(word))) > 1:
        return "findings and their signs"
    if any(map(SIGN_BEFORE.fullmatch, map(small, parts))):
        return "a finding with its sign before it"
    if len(parts) > 1 and any(
            value_of(part) and bare(part) != PREFIX or SHARE.fullmatch(part) for part in parts):
        return "a list of answers"
    if hold_answers([part for part in map(bare, parts) if part]):
        return "findings and their answers"
    return "a numbered list" if len(parts) > 1 and any(map(NUMBERED.fullmatch, parts)) else ""


def hold_answers(parts: list[str]) -> bool:
    """Whether parts of a list end or begin with answers: Mass yes|Nodule no, no Mass|no Nodule. At
    least two ends must be words, or all ends numbers; or all parts begin with an answer. A single
    part may hold several answers without any separator: Mass yes Nodule no."""
    def says(word: str) -> bool:
        return value_of(word) in ("0", "1") and word != PREFIX

    words = [re.split(r"[\s_-]+", part) for part in parts]
    if len(words) == 1:
        text = re.findall(r"[^\W\d_]{2,}", parts[0])
        found = [i for i, word in enumerate(text) if i and says(word) and not says(text[i - 1])]
        return len(found) > 1 and found[-1] == len(text) - 1
    ends = [of_one[-1] for of_one in words if len(of_one) > 1]
    return (sum(says(end) and not NUMBER.fullmatch(end) for end in ends) > 1
            or len(ends) == len(words) and all(says(end) or SHARE.fullmatch(end) for end in ends)
            or all(len(of_one) > 1 and says(of_one[0]) for of_one in words))


def refuse_answers_of_other_languages(labels: list[str], where: dict[str, str],
                                      shared: set[str], rules: LabelRules) -> None:
    """DataError for two words that may be yes and no in another language.

    That is doubted if no label names a finding or is an abbreviation such as TB or COPD, and the
    labels are two short words, or two of them are also in another column. shared: form_key of
    these."""
    if not rules.flags or rules.separator == "none" or not all(map(may_be_answer, labels)):
        return
    twins = [label for label in labels if form_key(label) in shared] if len(labels) < 5 else []
    kinds = ["".join(category(letter)[0] for letter in label) for label in labels]
    if len(twins) > 1 or len(labels) == 2 and all(
            len(kind) > 1 and kind.count("L") < 5 and not kind.strip("LM") for kind in kinds):
        one, other = (twins if len(twins) > 1 else labels)[:2]
        place = next(place for cell, place in where.items() if one in " ".join(cell.split()))
        also = ", which stand in another column as well," if len(twins) > 1 else ""
        raise DataError(f"{place}: {one!r} and {other!r}{also} may be yes and no in a language "
                        "that is not read: write 1 and 0; --class-columns takes every cell for "
                        "the name of a class")


def refuse_uncertain_findings(labels: list[str], lists: dict[str, list[str]],
                              where: dict[str, str], rules: LabelRules) -> None:
    """DataError for a label such as suspected Mass beside Mass: its images would count as without
    Mass. lists: the words of each cell."""
    if not rules.flags:
        return
    plain = {form_key(label): label for label in labels}
    cell_of = {word: cell for cell, parts in reversed(lists.items()) for word in parts}
    for word, cell in cell_of.items():
        finding = plain.get(DOUBTED.sub(" ", form_key(word)).strip())
        if finding and form_key(finding) != form_key(word):
            raise DataError(f"{where[cell]}: {word!r} seems to be an uncertain {finding!r}, which "
                            "would be absent there: a column of its own has -1 for that; "
                            "--class-columns takes every cell for the name of a class")


def may_be_answer(word: str) -> bool:
    """Whether a word names no finding and is no abbreviation, that is, capitals that cannot be
    spoken: COPD."""
    text = word.casefold()
    return not FINDINGS.search(text) and (not word.isupper() or bool(SPOKEN.fullmatch(text)))


def shared_words(table: Table, names: list[str], keys: list[str]) -> dict[str, set[str]]:
    """{column: its words that are also in another of these columns}, in the form of form_key and
    without values."""
    found = {}
    for name in names:
        place = table.columns.index(name)
        cells = {row.cells[place] for key in keys for row in table.all_rows(key)}
        found[name] = {form_key(cell) for cell in cells if value_of(cell) is None}
    often = Counter(chain.from_iterable(found.values()))
    return {name: {word for word in words if often[word] > 1} for name, words in found.items()}


def check_number_of_classes(table: Table, name: str, classes: int, images: int,
                            lists: bool, rules: LabelRules) -> None:
    """DataError if a column holds more classes than its images can teach.

    lists: an image may have several of the labels, so that more are allowed."""
    if classes * images > MOST_CELLS:
        raise DataError(f"{table.file}, column {name}: {classes:,} classes of {images:,} images "
                        "are more than fit into memory")
    most = max(200, images // 10) if lists else most_classes(images)
    if classes > most and not rules.many_classes:
        ask = "; --allow many-classes takes them" if rules.flags else ""
        raise DataError(f"{table.file}, column {name}: {classes:,} classes are more than "
                        f"{images:,} images can teach{ask}")


def most_classes(images: int) -> int:
    """How many classes that many images can teach: two images for each of up to 50 classes, ten for
    each of more. Two classes are always allowed."""
    return max(2, min(50, images // 2), images // 10)


# --------------------------------------------------------------------------------------------------
# Words.

def small(text: str) -> str:
    """A text in small letters, with one kind of dash and without zero-width characters."""
    text = DASHES.sub("-", normalize("NFKC", text).casefold())
    if not text.isascii():
        text = "".join(letter for letter in text if category(letter) != "Cf")
    return text


def bare(text: str) -> str:
    """The content of a cell: in small letters, without the quotes and blanks around it, and without
    a full stop or the like at its end."""
    text = unquoted(" ".join(small(text).split()))
    return text.rstrip(" .!,;:*") or text


def unquoted(text: str) -> str:
    """A text without the quotes and blanks around it. Typographic quotes are removed only if both
    ends have one."""
    text = text.strip()
    text = (text[1:] if BYTES.fullmatch(text) else text).strip("'\"").strip()
    quoted = text and text[0] in QUOTES and text[-1] in QUOTES
    return text.strip(QUOTES).strip() if quoted else text


def is_garbled(text: str) -> bool:
    """Whether a text was decoded wrongly: Neumon\ufffda, Neumon?a, or UTF-8 that was read as
    Latin-1 or Windows-1252."""
    if re.search(r"[^\W\d]\?[^\W\d]|\\(x[0-9a-f]{2}|u[0-9a-f]{4})", text, re.IGNORECASE):
        return True
    if text.isascii():
        return False
    if any("\x80" <= letter < "\xa0" for letter in text):              # controls of Latin-1
        return True
    for encoding in ("latin-1", "cp1252"):
        try:
            text.encode(encoding).decode()
            return True
        except UnicodeError:
            pass
    return "\ufffd" in text


def form_key(text: str) -> str:
    """Equal for names that differ only in case, blanks, dashes, "_", a full stop at the end, and
    zero-width characters. A dash at either end counts, as it may be a minus (HER2-, -Mass); so does
    the one in y -1."""
    text = re.sub(r"(?<!\S)-(?=\d(\.\d*)?$)", "minus", small(text).strip())
    words = " ".join(re.sub(r"[\s_-]+", " ", text).split())
    before, after = "-" * (words != "" and text[0] == "-"), "-" * text.endswith("-")
    return before + (words.rstrip(" .") or words) + after


def spellings(counts: Counter) -> dict[str, str]:
    """{word: its commonest spelling}. counts: {(anything, word): how often}."""
    often: Counter[str] = Counter()
    for (_, word), count in counts.items():
        often[word] += count
    best: dict[str, str] = {}
    for word in sorted(often, key=lambda word: (-often[word], word)):
        best.setdefault(form_key(word), word)
    return {word: best[form_key(word)] for word in often}


def merged(spelling: dict[str, str]) -> str:
    """A sentence on the words that were merged with another spelling, or ""."""
    pairs = [f"{word!r} as {label!r}" for word, label in sorted(spelling.items()) if word != label]
    more = f", and {len(pairs) - 5:,} more" if len(pairs) > 5 else ""
    return f" Taken for one: {', '.join(pairs[:5])}{more}." if pairs else ""


def read_lists(words: list[str], where: dict[str, str], rules: LabelRules,
               meaning: Callable[[str], str | None]) -> dict[str, list[str]]:
    """{cell: the words it holds}, for cells that are words or lists of words.

    meaning: returns "" for a word that says nothing. DataError if it is not clear how to split a
    list."""
    separator = rules.separator
    if separator == "none":
        return {word: [word] for word in words}

    # Lists in brackets, as Python, NumPy and JSON write them.
    bracketed = [word for word in words
                 if BRACKETS.get(word[0]) == word[-1] and word[-1] not in word[1:-1]]
    if len(bracketed) not in (0, len(words)) and not separator:
        raise ask_for_separator(bracketed[0], where)
    lists = {word: mentioned(bracketed_list(word, where[word], separator), meaning)
             for word in bracketed}
    words = [word for word in words if word not in lists]
    if not words:
        return lists

    # Which separator?
    found = [mark for mark in SEPARATORS if any(mark in word for word in words)]
    if not separator and len(found) > 1:
        raise ask_for_separator(next(word for word in words if found[1] in word), where)
    separator = separator or "".join(found)
    if not any(separator in word for word in words if separator):
        refuse_hidden_lists(words, where)       # also if `separator` is in no word
        return lists | {word: mentioned([word], meaning) for word in words}
    return lists | {word: mentioned(word.split(separator), meaning) for word in words}


def mentioned(parts: Iterable[str], meaning: Callable[[str], str | None]) -> list[str]:
    """The words of a list, without the quotes and blanks around them, except those that say
    nothing."""
    words = map(unquoted, parts)
    return [" ".join(word.split()) for word in words if meaning(word) != ""]


def bracketed_list(cell: str, where: str, separator: str) -> list[str]:
    """The words of `['a', 'b']`, `["a" "b"]` or `[a, b]`."""
    inner = cell[1:-1]
    if separator:
        return inner.split(separator)
    if "'" not in inner and '"' not in inner:
        return re.split(r"[,;|]", inner)
    # Only commas and blanks may remain between the quoted words.
    if re.sub(r"[\s,;|]", "", QUOTED.sub("", inner)):
        raise DataError(f"{where}: the list {cell!r} cannot be taken apart")
    return [one or other for one, other in QUOTED.findall(inner)]


def refuse_hidden_lists(words: list[str], where: dict[str, str]) -> None:
    """DataError for words that look like lists with a separator that is used only on request."""
    for word in words:
        # Several ICD codes: R91.8 J18.9.
        parts = word.split()
        if LIST_MARKS.search(word) or len(parts) > 1 and all(map(ICD.fullmatch, parts)):
            raise ask_for_separator(word, where)
    plain = {form_key(word) for word in words if not GAP.search(word)}
    for word in words:
        if GAP.search(word) and form_key(word) not in plain:
            raise ask_for_separator(word, where)
    for word in names_of_others(words):
        raise ask_for_separator(word, where)
    # Mass - Nodule and Nodule - Edema: the end of one word is the beginning of another. This leaves
    # left effusion and right effusion alone, and also effusion and pleural effusion.
    ends: set[str] = set()
    for word in words:
        ends |= edges(form_key(word), last=True)
    for word in words:
        if ends & edges(form_key(word), last=False):
            raise ask_for_separator(word, where)


def names_of_others(words: list[str]) -> list[str]:
    """The words that contain other words, as if they were lists of them."""
    found = []
    known = {form_key(word) for word in words}
    # Mass and Mass/Edema: with a mark between them, one word that is found elsewhere is enough.
    marks = {mark for word in words for mark in word
             if category(mark) in MARKS or mark in LINE_ENDS} - NO_MARKS
    for mark in [*sorted(marks), " and "]:
        parts_of = {word: [form_key(part) for part in word.split(mark) if part.strip()]
                    for word in words if mark in word}
        often = Counter(part for parts in parts_of.values() for part in set(parts))
        for word, parts in parts_of.items():
            # The + of TB+ and the # of TB #1 are no separators.
            named = len(parts) > 1 and all(re.search(r"[^\W\d]", part) for part in parts)
            # What Grade: A and Grade: B share is the name of the column, and no finding.
            if named and any(part in known or often[part] > 1 and mark != ":" for part in parts):
                found.append(word)
    # Mass, Nodule and Mass#Nodule or Mass with Nodule: any separator. A class of several words
    # rarely contains two other classes.
    without_numbers = {" ".join(re.findall(r"[^\W\d]\w*", word)) for word in known} - {""}
    for word in words:
        others = (known & runs(form_key(word))) - {form_key(word)}
        if others:                      # Nodule no Mass also says Nodule; no Mass says neither
            denied = re.sub(r"(?<=\w) (no|not) (?=\w)", " ", form_key(word))
            others |= known & runs(denied)
        text = " ".join(re.findall(r"[^\W\d]\w*", form_key(word)))   # 1. Mass 2. Nodule
        others |= (without_numbers & runs(text)) - {text}
        if any(one not in other and other not in one for one in others for other in others):
            found.append(word)
    # Mass, Nodule and MassNodule.
    for word in words:
        text = form_key(word)
        if any(text[:middle] in known and text[middle:] in known
               for middle in range(2, len(text) - 1)):
            found.append(word)
    return found


def runs(text: str) -> set[str]:
    """All runs of up to LONGEST_RUN words in a text in form_key's form. Texts of more than 30 words
    are reports and give none."""
    # No Lung Opacity must not name Lung Opacity.
    words = re.findall(r"\w+", re.sub(r"\b(no|not|non|without) +(?=\w)", r"\1", text))
    if len(words) > 30:
        return set()
    return {" ".join(words[start:end]) for start in range(len(words))
            for end in range(start + 1, min(start + LONGEST_RUN, len(words)) + 1)}


def edges(text: str, last: bool) -> set[str]:
    """The runs of up to LONGEST_RUN words with which a text begins, or ends if `last`, without the
    whole text.

    Neither a run nor the rest of the text may be numbers only, as in stage 1 and 1 stage. Texts of
    more than 30 words give none."""
    words = re.findall(r"\w+", text)
    if len(words) > 30:
        return set()
    found = set()
    for length in range(1, min(LONGEST_RUN + 1, len(words))):
        middle = len(words) - length if last else length
        parts = " ".join(words[:middle]), " ".join(words[middle:])
        if all(re.search(r"[^\W\d]", part) for part in parts):
            found.add(parts[last])
    return found


def ask_for_separator(word: str, where: dict[str, str]) -> DataError:
    """The error for a word that may be a list."""
    return DataError(f"{where[word]}: {word!r} may be a list: --label-separator says what "
                     "separates its words, and --label-separator none takes it whole")
