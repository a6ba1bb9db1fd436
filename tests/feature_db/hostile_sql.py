"""Statements that somebody might send who means harm, or knows no better: {name: (SQL, error)}.

The error is a pattern of the one line that each ends in.
"""

ANOTHER = "untrusted SQL is one SELECT, SHOW or DESCRIBE: this is "
NO_FILES = "file system operations are disabled by configuration"
LOCKED = "the configuration has been locked"
DEEP = "Max expression depth"
TIME = r"was stopped after [\d.]+ s: ask for less, or raise SqlLimits\.time_s"
SIZE = r"the result is larger than 1 MB: add a LIMIT .* raise SqlLimits\.result_bytes"
MEMORY = (
    r"needs more than 300 MB of memory: .* raise SqlLimits\.memory_bytes|its process down \(SIG"
)
EITHER = rf"{TIME}|{MEMORY}"

REFUSED: dict[str, tuple[str, str]] = {
    "COPY TO": ("COPY features TO 'out.csv'", ANOTHER + "COPY"),
    "COPY of a query": ("COPY (SELECT 1) TO 'out.parquet'", ANOTHER + "COPY"),
    "COPY FROM": ("COPY features FROM '/etc/passwd'", ANOTHER + "COPY"),
    "EXPORT": ("EXPORT DATABASE 'out'", ANOTHER + "EXPORT"),
    "IMPORT": ("IMPORT DATABASE 'out'", ANOTHER),
    "ATTACH": ("ATTACH 'other.duckdb'", ANOTHER + "ATTACH"),
    "DETACH": ("DETACH one", ANOTHER + "DETACH"),
    "USE": ("USE memory", ANOTHER),
    "INSTALL": ("INSTALL httpfs", ANOTHER),
    "LOAD": ("LOAD httpfs", ANOTHER),
    "SET": ("SET enable_external_access = true", ANOTHER + "SET"),
    "RESET": ("RESET lock_configuration", ANOTHER + "SET"),
    "SET VARIABLE": ("SET VARIABLE x = 1", ANOTHER + "SET"),
    "PRAGMA": ("PRAGMA database_list", ANOTHER + "PRAGMA"),
    "CALL": ("CALL pragma_database_size()", ANOTHER + "CALL"),
    "CHECKPOINT": ("CHECKPOINT", ANOTHER),
    "VACUUM": ("VACUUM", ANOTHER + "VACUUM"),
    "CREATE TEMP TABLE": ("CREATE TEMP TABLE t AS SELECT 1", ANOTHER + "CREATE"),
    "CREATE MACRO": ("CREATE MACRO f(a) AS a", ANOTHER + "CREATE"),
    "CREATE SECRET": ("CREATE SECRET s (TYPE s3)", ANOTHER + "CREATE"),
    "INSERT": ("INSERT INTO features SELECT * FROM features", ANOTHER + "INSERT"),
    "UPDATE": ("UPDATE features SET label = 'x'", ANOTHER + "UPDATE"),
    "DELETE": ("DELETE FROM features", ANOTHER + "DELETE"),
    "MERGE": (
        "MERGE INTO saes USING saes AS s ON false WHEN NOT MATCHED THEN INSERT *",
        ANOTHER + "MERGE",
    ),
    "DROP": ("DROP TABLE features", ANOTHER + "DROP"),
    "ALTER": ("ALTER TABLE features ADD COLUMN x INTEGER", ANOTHER + "ALTER"),
    "BEGIN": ("BEGIN", ANOTHER + "TRANSACTION"),
    "EXPLAIN": ("EXPLAIN ANALYZE COPY saes TO 'out.csv'", ANOTHER + "EXPLAIN"),
    "PREPARE": ("PREPARE p AS SELECT 1", ANOTHER + "PREPARE"),
    "EXECUTE": ("EXECUTE p", ANOTHER + "EXECUTE"),
    "PIVOT": ("PIVOT features ON is_dead USING count(*)", ANOTHER + "MULTI"),
    "two statements": ("SELECT 1; DROP TABLE features", "holds 2 statements: give one SELECT"),
    "behind a NUL": ("SELECT 1\0; DROP TABLE features", "holds 2 statements: give one SELECT"),
    "nothing": ("-- nothing", "holds 0 statements: give one SELECT"),
    "a writing CTE": (
        "WITH x AS (DELETE FROM features RETURNING *) SELECT * FROM x",
        "read-only|syntax error|SELECT",
    ),
    "read_csv": ("FROM read_csv('/etc/passwd')", NO_FILES),
    "sniff_csv": ("FROM sniff_csv('/etc/passwd')", NO_FILES),
    "read_text": ("FROM read_text('/etc/passwd')", NO_FILES),
    "read_blob": ("FROM read_blob('/proc/self/environ')", NO_FILES),
    "read_json": ("FROM read_json('/etc/passwd')", NO_FILES),
    "read_parquet": ("FROM read_parquet('/tmp/*.parquet')", NO_FILES),
    "parquet_metadata": ("FROM parquet_metadata('/tmp/x.parquet')", NO_FILES),
    "glob": ("FROM glob('/*')", NO_FILES),
    "a file as a table": ("FROM '/etc/passwd'", "/etc/passwd does not exist"),
    "a URL": ("FROM 'http://127.0.0.1:9/x.csv'", NO_FILES),
    "query()": ("FROM query('FROM read_text(''/etc/passwd'')')", NO_FILES),
    "query() that writes": ("FROM query('COPY saes TO ''out.csv''')", "single SELECT"),
    "query_table()": ("FROM query_table('/etc/passwd')", "/etc/passwd does not exist"),
    "getenv": ("SELECT getenv('HOME')", "getenv does not exist"),
    "extensions' folder": ("FROM duckdb_extensions()", "disabled by configuration"),
    "logging to a file": ("FROM enable_logging(storage = 'file', storage_path = 'log')", LOCKED),
    "a server": ("FROM quack_serve('quack:localhost')", "not in the catalog"),
    "a forced checkpoint": ("FROM force_checkpoint()", "CHECKPOINT|read-only"),
    "not a number": ("SELECT 'x'::INTEGER", "Conversion Error: .*near '::INTEGER'"),
    "no such type": ("SELECT label + 1 FROM features", "Binder Error"),
    "division by zero": ("SELECT 1 // 0", "[Dd]ivision by zero"),
    "overflow": ("SELECT 9223372036854775807 + 1", "Overflow"),
    "decimals": ("SELECT 1e38::DECIMAL(38, 0) * 10", "Out of Range|Conversion|Overflow"),
    "its own error": ("SELECT error('boo')", "boo"),
    "no parameter": ("SELECT ?", "not provided"),
    "no such table": ("FROM featuers", "the tables are coactivations, contexts"),
    "control characters": ('SELECT "\x1b[2Jboo"', r"<U\+001B>\[2Jboo"),
    "a text too large": ("SELECT repeat('x', 10000000000)", "Out of Range"),
    "a list too large": ("SELECT unnest(range(10000000000))", "not supported"),
    "nested expressions": (f"SELECT {'NOT ' * 50000}true", DEEP),
    "a long sum": (f"SELECT 1{'+1' * 20000}", DEEP),
    "nested lists": (f"SELECT {'[' * 5000}1{']' * 5000}", DEEP),
    "nested queries": (f"{'FROM (' * 3000}features{')' * 3000}", DEEP),
}

TOO_MUCH: dict[str, tuple[str, str]] = {
    "memory: a list": ("SELECT list_sum(range(3000000000))", MEMORY),
    "memory: a text": ("SELECT length(repeat('x', 900000000))", MEMORY),
    "memory: string_agg": (
        "SELECT length(string_agg(repeat('x', 1000), '')) FROM range(100000000)",
        MEMORY,
    ),
    "memory: list": ("SELECT len(list(range)) FROM range(10000000000)", EITHER),
    "memory: lambda": ("SELECT list_transform(range(1000000000), lambda x: x * x)", MEMORY),
    "memory: map": ("SELECT map(range(100000000), range(100000000))", MEMORY),
    "memory: format": ("SELECT format('{:>1000000000}', 'x')", MEMORY),
    "memory: printf": ("SELECT printf('%2000000000d', 1)", MEMORY),
    "memory: sort": (
        "SELECT max(h) FROM (SELECT hash(range) AS h FROM range(1000000000) ORDER BY h OFFSET 9)",
        EITHER,
    ),
    "memory: window": (
        "SELECT max(s) FROM (SELECT sum(a.range) OVER (ORDER BY b.range) AS s "
        "FROM range(100000) a, range(100000) b)",
        EITHER,
    ),
    "memory: parentheses": (f"SELECT {'(' * 50000}1{')' * 50000}", EITHER),
    "memory: columns": (f"SELECT {', '.join(f'{i} AS c{i}' for i in range(60000))}", EITHER),
    "size: rows": ("FROM generate_series(1, 1000000000000)", SIZE),
    "size: unnest": ("SELECT unnest(range(1000)) FROM range(1000000)", SIZE),
    "size: cross join": ("FROM contexts AS a, contexts AS b, contexts AS c", rf"{SIZE}|{EITHER}"),
    "size: one value": ("SELECT repeat('x', 2000000)", SIZE),
    "size: names of columns": (f"SELECT 1 AS {'x' * 1_000_001}", SIZE),
    "request: SQL": (f"SELECT '{'x' * 50_000_000}'", "take 50,000,1.. bytes: expected at most"),
}


ENDLESS: dict[str, tuple[str, str]] = {
    "cross join": (
        "SELECT count(*) FROM range(1000000) a, range(1000000) b, range(9) c",
        TIME,
    ),
    "recursion": (
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
        TIME,
    ),
    "one call": ("SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))", TIME),
    "sleep": ("SELECT sleep_ms(100000)", TIME),
    "lpad": ("SELECT length(lpad('x', 2000000000, 'y'))", EITHER),
    "bits": ("SELECT bitstring('1', 2000000000)", EITHER),
}
