"""What the baselines share: a person's visible rows as features, splits, intervals by person.

numpy and pyarrow are imported where they are needed: a script first moves into an environment
that has them.
"""

from __future__ import annotations

from pathlib import Path

DAY_US = 86_400_000_000
DAYS_PER_YEAR = 365.2425
MINIMUM_PEOPLE = 20
SPLITS = ["train", "tuning", "held_out"]
PATH_COLUMNS = ["image_path", "waveform_path", "omics_path", "audio_path"]


def read_splits(cohort: Path, subjects):
    """The split of each of `subjects`, empty for those in none."""
    import numpy
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(cohort / "metadata" / "subject_splits.parquet")
    split_of = dict(zip(table["subject_id"].to_pylist(), table["split"].to_pylist()))
    return numpy.array([split_of.get(subject, "") for subject in subjects.tolist()])


def build_features(cohort: Path, subjects, moments, training, sources=None,
                   minimum_people=MINIMUM_PEOPLE):
    """One row a label, `NaN` where something is missing: of the rows up to and including the
    label's moment the age, and for every code that at least `minimum_people` people of `training`
    (true or false a label) have, what `code_features` says. Labels are sorted by subject.

    `sources` are the values of the column `site` whose rows count; all by default. Rows that point
    to an item (a picture, a recording) say nothing here.
    """
    import numpy
    import pyarrow
    import pyarrow.parquet

    birth = numpy.full(len(subjects), numpy.nan)
    rows_of = {}  # code: list of (label, days before the prediction or NaN, number or NaN)
    for file in sorted((cohort / "data").rglob("*.parquet")):
        names = pyarrow.parquet.read_schema(file).names
        wanted = ["subject_id", "time", "code", "numeric_value", "site", *PATH_COLUMNS]
        table = pyarrow.parquet.read_table(file, columns=[name for name in wanted if name in names])
        table = table.filter(counted_rows(table, sources))
        owners = table["subject_id"].to_numpy()
        times = table["time"].cast(pyarrow.int64()).to_numpy(zero_copy_only=False).astype(float)
        values = (table["numeric_value"].to_numpy(zero_copy_only=False)
                  if "numeric_value" in names else numpy.full(len(owners), numpy.nan))
        codes = table["code"].cast(pyarrow.string()).combine_chunks().dictionary_encode()
        keys, vocabulary = codes.indices.to_numpy(), codes.dictionary.to_pylist()
        # Every row meets every label of its person.
        start = numpy.searchsorted(subjects, owners, side="left")
        count = numpy.searchsorted(subjects, owners, side="right") - start
        row = numpy.repeat(numpy.arange(len(owners)), count)
        label = numpy.repeat(start, count) + (
            numpy.arange(len(row)) - numpy.repeat(numpy.cumsum(count) - count, count)
        )
        days = (moments[label] - times[row]) / DAY_US
        visible = numpy.isnan(days) | (days >= 0)
        row, label, days = row[visible], label[visible], days[visible]
        for key, code in enumerate(vocabulary):
            of_code = keys[row] == key
            part = label[of_code], days[of_code], values[row[of_code]].astype(float)
            if code == "MEDS_BIRTH":
                birth[part[0]] = part[1]
            else:
                rows_of.setdefault(code, []).append(part)
    columns = [birth / DAYS_PER_YEAR]
    for code in sorted(rows_of):
        label, days, value = (numpy.concatenate(parts) for parts in zip(*rows_of[code]))
        if len(set(subjects[label[training[label]]])) >= minimum_people:
            columns += code_features(label, days, value, len(subjects))
    return numpy.column_stack(columns)


def counted_rows(table, sources):
    import numpy
    import pyarrow
    import pyarrow.compute

    rows = pyarrow.array(numpy.ones(len(table), bool))
    for name in PATH_COLUMNS:
        if name in table.column_names:
            rows = pyarrow.compute.and_(rows, pyarrow.compute.is_null(table[name]))
    if sources is not None and "site" in table.column_names:
        among = pyarrow.compute.is_in(table["site"], pyarrow.array(sources, pyarrow.string()))
        rows = pyarrow.compute.and_(rows, among)
    return rows


def code_features(label, days, value, count: int) -> list:
    """Of one code's rows: how many, days since the first and the last, and of their numbers the
    last, mean, smallest and largest."""
    import numpy

    def empty():
        return numpy.full(count, numpy.nan)

    features = [numpy.bincount(label, minlength=count).astype(float)]
    timed = ~numpy.isnan(days)
    if timed.any():
        first, last = empty(), empty()
        numpy.fmax.at(first, label[timed], days[timed])
        numpy.fmin.at(last, label[timed], days[timed])
        features += [first, last]
    numeric = ~numpy.isnan(value)
    if numeric.any():
        label, days, value = label[numeric], days[numeric], value[numeric]
        latest, smallest, largest = empty(), empty(), empty()
        order = numpy.argsort(-numpy.nan_to_num(days, nan=numpy.inf), kind="stable")
        latest[label[order]] = value[order]  # the last assignment stays
        numpy.fmin.at(smallest, label, value)
        numpy.fmax.at(largest, label, value)
        with numpy.errstate(invalid="ignore"):
            mean = (numpy.bincount(label, value, minlength=count)
                    / numpy.bincount(label, minlength=count))
        features += [latest, mean, smallest, largest]
    return features


def bootstrap(people, labels, scores, metrics: dict, resamples: int, random) -> dict:
    """Each metric with its percentile interval, people drawn with replacement."""
    import numpy

    _, person = numpy.unique(people, return_inverse=True)
    rows_of = numpy.split(numpy.argsort(person, kind="stable"), numpy.cumsum(numpy.bincount(person))[:-1])
    drawn = {name: [] for name in metrics}
    for _ in range(resamples):
        chosen = random.integers(0, len(rows_of), len(rows_of))
        rows = numpy.concatenate([rows_of[position] for position in chosen])
        if labels[rows].min() == labels[rows].max():
            continue  # of one class nothing can be told apart
        for name, metric in metrics.items():
            drawn[name].append(metric(labels[rows], scores[rows]))
    return {
        name: {
            "estimate": float(metric(labels, scores)),
            "low": float(numpy.quantile(drawn[name], 0.025)),
            "high": float(numpy.quantile(drawn[name], 0.975)),
        }
        for name, metric in metrics.items()
    }
