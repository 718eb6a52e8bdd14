"One reader of tables: what is right comes back to the letter, what is not is refused with its line."
import json

import pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from ctvlm.core import InputError
from ctvlm.tables import TEXTS, Table, escape_cell, parse_columns, read_table, roles, unescape_cell, write_table


def write(tmp_path, text, name="t.csv", encoding="utf-8"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return tmp_path / name


REPORTS = [("0012", "Cyst, \"large\",\nleft kidney."), ("9007199254740993", "Zyste; größer"), ("7.0", "x\ty")]
TEXTUAL = {
    "commas": ("t.csv", lambda f, p: f.to_csv(p, index=False)),
    "semicolons": ("t.csv", lambda f, p: f.to_csv(p, index=False, sep=";")),
    "BOM": ("t.csv", lambda f, p: f.to_csv(p, index=False, encoding="utf-8-sig")),
    "UTF-16": ("t.csv", lambda f, p: f.to_csv(p, index=False, encoding="utf-16")),
    "UTF-16 without BOM": ("t.csv", lambda f, p: f.to_csv(p, index=False, encoding="utf-16-le")),
    "tabs": ("t.tsv", lambda f, p: f.to_csv(p, index=False, sep="\t")),
    "tabs in .txt": ("t.txt", lambda f, p: f.to_csv(p, index=False, sep="\t")),
    "Windows lines": ("t.csv", lambda f, p: f.to_csv(p, index=False, lineterminator="\r\n")),
    "JSON lines": ("t.jsonl", lambda f, p: f.to_json(p, orient="records", lines=True)),
    "Parquet": ("t.parquet", lambda f, p: f.to_parquet(p)),
    "Excel": ("t.xlsx", lambda f, p: f.to_excel(p, index=False)),
    "ours": ("t.csv", write_table),
}


@pytest.mark.parametrize("kind", TEXTUAL)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    name, save = TEXTUAL[kind]
    save(pd.DataFrame(REPORTS, columns=["Study ID", "Report_Text"]), tmp_path / name)
    table = read_table(tmp_path / name, need=("study", "text"))
    assert list(table.itertuples(index=False, name=None)) == REPORTS and list(table) == ["study", "report"]


@pytest.mark.parametrize("text, says", [
    ('study,report\n101,"Cyst in the left kidney.",\n', "line 2 has 3 fields where the head has 2"),
    ("study,report\n1,a\n2,b, c\n", "line 3 has 3 fields"),
    ("study,report\n1,a\n2\n", "line 3 has 1 fields"),
    ('study,report\n1,"two\nlines"\n2,b,c\n', "line 4 has 3 fields"),
    ('study,report\n1,"a\n2,b\n3,c\n', "in lines 2 to 4 a quotation mark does not close"),
    ('study,report\n1,"a\n2,"b"\n3,c\n', "in lines 2 to 3 a quotation mark does not close"),
    ("study,report\n1,囊肿\n".encode("gbk"), r"line 2 is not UTF-8 \(byte 0x"),
    ("study,report\n1,gut\n2,größer\n".encode("cp1252"), r"line 3 is not UTF-8 \(byte 0xf6\)"),
    ("study,größe,report\n1,2,3\n".encode("cp1252"), "line 1 is not UTF-8"),
    ("study,study,report\n1,2,3\n", "two columns 'study'"),
    ("Study,study,report\n1,2,3\n", "the columns Study, study, each may be study"),
    ("a,b\n1,2\n", r"columns a, b, expected also study and report, or findings and impression"),
    ("", "expected also study"),
])
def test_what_does_not_fit_is_refused_with_its_line(tmp_path, text, says):
    with pytest.raises(InputError, match=says): read_table(write(tmp_path, text), need=("study", "text"))


@pytest.mark.parametrize("name, text, says", [
    ("t.jsonl", '{"study": "1", "report": "a"}\n{"study": "2", "report"\n', "line 2 is no JSON"),
    ("t.jsonl", '{"study": "1", "report": "a"}\n[1]\n', "line 2 is no JSON object"),
    ("t.parquet", "no Parquet", "cannot be read as .parquet"), ("t.xlsx", "no book", "cannot be read as .xlsx"),
    ("t.docx", "x", "ends in .docx, expected .csv"), ("t", "x", "ends in nothing"),
])
def test_other_files(tmp_path, name, text, says):
    with pytest.raises(InputError, match=says): read_table(write(tmp_path, text, name))
    with pytest.raises(InputError, match="found no file"): read_table(tmp_path / "none.csv")


def test_no_report_stands_in_a_message(tmp_path):
    path = write(tmp_path, "study,report\n1,Mr Secret has a cyst, large\n")
    with pytest.raises(InputError) as e: read_table(path)
    assert "Secret" not in str(e.value)


def test_bad_rows_can_be_collected_and_the_rest_is_read(tmp_path):
    text = b"study,report\n1,a\n2,b,c\n3,gr\xf6\xdfer\n4,d\n"
    t, bad = Table(write(tmp_path, text)), []
    assert [row["study"] for _, row in t.rows(bad)] == ["1", "4"] and [line for line, _ in bad] == [3, 4]
    assert [[line for line, _ in piece] for piece in t.pieces(1, [])] == [[2], [5]]


def test_numbers_stored_as_numbers(tmp_path):
    gap = pd.DataFrame(dict(study=[1234, None], report=["a", "b"]))
    gap.to_parquet(tmp_path / "gap.parquet"); gap.to_excel(tmp_path / "gap.xlsx", index=False)
    for name in ("gap.parquet", "gap.xlsx"): assert read_table(tmp_path / name).study.tolist() == ["1234", ""]
    assert read_table(write(tmp_path, '{"study": 12345678901234567890, "report": "a"}\n', "n.jsonl")).study[0] == "12345678901234567890"
    pd.DataFrame(dict(study=[1234567890123456789, None], report="a")).to_parquet(tmp_path / "lost.parquet")
    with pytest.raises(InputError, match="row 1 holds a number that has lost digits"): read_table(tmp_path / "lost.parquet")


def test_zeros_that_a_spreadsheet_shows_are_kept(tmp_path):
    import openpyxl
    book = openpyxl.Workbook()
    for row in (["study", "report"], [12, "a"]): book.active.append(row)
    book.active["A2"].number_format = "00000"
    book.save(tmp_path / "t.xlsx")
    assert read_table(tmp_path / "t.xlsx").study[0] == "00012"


def test_columns_by_name(tmp_path):
    path = write(tmp_path, "id,Accession,Text,report,Age\n1,A1,new,old,61\n")
    t = Table(path, parse_columns("study=accession, report=Text"))
    assert t.used == {"study": "Accession", "report": "Text"} and t.ignored == ["id", "report", "Age"]
    assert "ignored id, report, Age" in t.says()
    assert read_table(path, {"report": "Text"}).iloc[0].to_dict() == {"id": "1", "study": "A1", "report": "new", "report (ignored)": "old", "Age": "61"}
    with pytest.raises(InputError, match="no column 'Befund' for report"): Table(path, {"report": "Befund"})
    with pytest.raises(InputError, match="role 'studie'"): parse_columns("studie=x")


def test_parts_of_a_report_are_joined_once(tmp_path):
    path = write(tmp_path, "study,report,findings,impression\n1,Stone and  cyst.,stone,Cyst.\n2,a,b,c\n3,,b,c\n4,Stone. Cyst.,Stone.,Cyst.\n")
    t = Table(path)
    assert [t.report(row)[0] for _, row in t] == ["Stone and  cyst.\nstone\nCyst.", "a\nb\nc", "b\nc", "Stone. Cyst."]


def test_names_of_columns_are_told_apart():
    "No name stands for two roles, and the names of the public data sets are known."
    every = [n for names in roles().values() for n in names]
    assert len(every) == len(set(every)) and set(TEXTS) <= set(roles())
    for name in ("VolumeName", "Findings_EN", "Impressions_EN", "AccessionNumber", "ReportText", "study id", "NoteAcc_DEID", "Befund", "Beurteilung"):
        assert name.replace("_", "").replace(" ", "").lower() in every


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_what_is_quoted_is_undone(text):
    assert unescape_cell(escape_cell(text)) == text
    assert escape_cell(text)[:1] not in ("=", "@") and (escape_cell(text)[:1] not in "+-" or not text or text[1:2] in "0123456789")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))), min_size=1))
def test_any_text_comes_back(tmp_path_factory, rows):
    frame = pd.DataFrame(rows, columns=["study", "report"])
    for name in ("t.csv", "t.tsv", "t.jsonl"):
        path = write_table(frame, tmp_path_factory.mktemp("t") / name)
        assert read_table(path).values.tolist() == [list(r) for r in rows]
