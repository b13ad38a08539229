//! The data side at scale: a generated cohort, from Parquet to collated batches, with the peak
//! memory of each stage.
//!
//! ```text
//! cargo bench --bench cohort_scale                          1,000,000 patients with 100 events each
//! cargo bench --bench cohort_scale -- --patients 20000 --json
//! ```
//!
//! Everything is written to a temporary folder (`--folder DIR` for another place; about 1.5 GB for
//! the full size) and removed. Peak memory is the largest resident set (`VmHWM`), mapped pages of
//! the sequence cache included; it is reset before each stage. Exit status 1 when a stage takes
//! more than `--limit-gib` (4).

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use calor_records::{
    BIRTH_CODE, CodeEntry, Cohort, Event, Label, LabelValue, Labels, MICROSECONDS_PER_DAY, Patient,
    ShardOptions, ShardWriter, Split, write_codes, write_labels, write_splits,
};
use calor_sequence::{
    BatchPlan, ItemStore, Order, Overlength, PatientTokenizer, PlanOptions, Prefetcher,
    SequenceOptions, TaskLabels, prepare,
};
use serde_json::{Value, json};

const PATIENTS_PER_SHARD: usize = 10_000;
const CODES: u64 = 2_000;
const WORDS: [&str; 12] = [
    "blood", "serum", "left", "right", "acute", "chronic", "pressure", "glucose", "pain", "heart",
    "kidney", "lung",
];
const GIB: f64 = (1u64 << 30) as f64;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

struct Options {
    patients: usize,
    events: usize,
    max_tokens: usize,
    folder: PathBuf,
    limit_gib: f64,
    json: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cohort_scale: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let options = parse()?;
    let folder = tempfile::Builder::new()
        .prefix("calor-cohort-scale-")
        .tempdir_in(&options.folder)?;
    let root = folder.path();
    let mut stages = Vec::new();
    let rows = (options.patients * (options.events + 2)) as u64;
    if !options.json {
        println!(
            "{} patients, {} events each, {rows} rows",
            options.patients, options.events
        );
        println!(
            "{:<34}{:>9}{:>16}{:>12}{:>12}",
            "", "seconds", "rows/s", "peak MiB", "disk MiB"
        );
    }
    let mut stage = |name: &'static str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        reset_peak();
        let start = Instant::now();
        work()?;
        let seconds = start.elapsed().as_secs_f64();
        let peak = peak_bytes()?;
        let disk = folder_bytes(root)?;
        if !options.json {
            println!(
                "{name:<34}{seconds:>9.1}{:>16.0}{:>12.0}{:>12.0}",
                rows as f64 / seconds,
                peak as f64 / (1 << 20) as f64,
                disk as f64 / (1 << 20) as f64,
            );
        }
        stages.push(json!({
            "stage": name,
            "seconds": seconds,
            "rows_per_second": rows as f64 / seconds,
            "peak_bytes": peak,
            "disk_bytes": disk,
        }));
        Ok(())
    };

    stage("generate", &mut || generate(root, &options))?;

    let mut opened = None;
    stage("open: check and index", &mut || {
        opened = Some(Cohort::open(root)?);
        Ok(())
    })?;
    let cohort = opened.ok_or("opened above")?;
    ensure(
        cohort.subject_count() == options.patients && cohort.row_count() == rows,
        "the index differs from what was generated",
    )?;

    stage("stream every patient", &mut || {
        let read = stream(&cohort)?;
        ensure(read == rows, "rows were lost in reading")
    })?;

    let tokenizer = PatientTokenizer::open(&write_tokenizer(root)?)?;
    let sequence = SequenceOptions {
        max_tokens: options.max_tokens,
        overlength: Overlength::DropOldestEvents,
        ..SequenceOptions::default()
    };
    let cache = root.join("cache");
    let ready = || -> Result<_> {
        let labels = Labels::read(&root.join("labels/outcome"))?;
        let labels = TaskLabels::binary("outcome", &labels)?;
        let prepared = prepare(
            &cohort,
            &labels,
            &tokenizer,
            &sequence,
            None,
            &cache,
            &|_| {},
        )?;
        ensure(prepared.len() == options.patients, "samples were lost")?;
        Ok(prepared)
    };
    stage("prepare: text, tokens, cache", &mut || {
        ensure(!ready()?.cache_hit(), "there was a cache already")
    })?;
    let mut prepared = None;
    stage("prepare again: from the cache", &mut || {
        let found = ready()?;
        ensure(found.cache_hit(), "the cache was not used")?;
        prepared = Some(Arc::new(found));
        Ok(())
    })?;
    let prepared = prepared.ok_or("prepared above")?;

    let mut tokens = 0;
    stage("an epoch of packed batches", &mut || {
        tokens = epoch(&prepared, &tokenizer, options.max_tokens)?;
        Ok(())
    })?;

    let largest = stages
        .iter()
        .filter_map(|stage| stage["peak_bytes"].as_u64())
        .max()
        .unwrap_or(0) as f64;
    let within = largest <= options.limit_gib * GIB;
    if options.json {
        let report = json!({
            "patients": options.patients,
            "events_per_patient": options.events,
            "rows": rows,
            "tokens": tokens,
            "stages": stages,
            "peak_bytes": largest as u64,
            "limit_bytes": (options.limit_gib * GIB) as u64,
            "within": within,
        });
        println!("{report:#}");
    } else {
        println!(
            "peak of all stages {:.2} GiB, limit {} GiB: {}",
            largest / GIB,
            options.limit_gib,
            if within { "kept" } else { "exceeded" }
        );
    }
    Ok(within)
}

fn ensure(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

fn parse() -> Result<Options> {
    let mut options = Options {
        // Without cargo's `--bench` this runs as a test: a small cohort suffices then.
        patients: 2_000,
        events: 100,
        max_tokens: 256,
        folder: std::env::temp_dir(),
        limit_gib: 4.0,
        json: false,
    };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--bench") {
        options.patients = 1_000_000;
    }
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .ok_or_else(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--bench" => {}
            "--json" => options.json = true,
            "--patients" => options.patients = value()?.parse()?,
            "--events" => options.events = value()?.parse()?,
            "--max-tokens" => options.max_tokens = value()?.parse()?,
            "--limit-gib" => options.limit_gib = value()?.parse()?,
            "--folder" => options.folder = value()?.into(),
            other => {
                let known =
                    "--patients N, --events N, --max-tokens N, --limit-gib X, --folder DIR, --json";
                return Err(format!("unknown argument {other}; known: {known}").into());
            }
        }
    }
    ensure(options.patients > 0, "--patients must be at least 1")?;
    Ok(options)
}

/// A mixing function (SplitMix64): a patient's events depend on its number alone.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn generate(root: &Path, options: &Options) -> Result<()> {
    let codes: Vec<Arc<str>> = (0..CODES)
        .map(|code| format!("CODE//{code}").into())
        .collect();
    let shards = options.patients.div_ceil(PATIENTS_PER_SHARD);
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism()?.get().min(shards);
    std::thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    loop {
                        let shard = next.fetch_add(1, Ordering::Relaxed);
                        if shard >= shards {
                            return Ok(());
                        }
                        generate_shard(root, options, &codes, shard)?;
                    }
                })
            })
            .collect();
        for worker in workers {
            match worker.join() {
                Ok(result) => result?,
                Err(_) => return Err("a thread that wrote shards panicked".into()),
            }
        }
        Ok(())
    })?;

    let entries: Vec<CodeEntry> = (0..CODES)
        .map(|code| {
            let word = |at: u64| WORDS[(at % WORDS.len() as u64) as usize];
            CodeEntry {
                description: Some(
                    format!("{} {} {}", word(code), word(code / 12), code % 14).into(),
                ),
                parent_codes: Vec::new(),
            }
        })
        .collect();
    write_codes(root, codes.iter().map(|code| &**code).zip(&entries))?;
    let splits: Vec<(i64, Split)> = (0..options.patients)
        .map(|patient| {
            let split = match patient % 10 {
                0 | 1 => Split::HeldOut,
                2 => Split::Tuning,
                _ => Split::Train,
            };
            (patient as i64, split)
        })
        .collect();
    write_splits(root, &splits)?;
    let labels: Vec<Label> = (0..options.patients)
        .map(|patient| Label {
            subject_id: patient as i64,
            prediction_time_us: 20_000 * MICROSECONDS_PER_DAY,
            value: LabelValue::Boolean(Random(patient as u64).below(10) == 0),
        })
        .collect();
    write_labels(&root.join("labels/outcome/0.parquet"), &labels)?;
    Ok(())
}

/// Patients of one shard: sex, birth, and events over twenty years, two in three with a number.
fn generate_shard(root: &Path, options: &Options, codes: &[Arc<str>], shard: usize) -> Result<()> {
    let sites: [Arc<str>; 3] = ["hospital", "general practice", "municipality"].map(Arc::from);
    let sexes: [Arc<str>; 2] = ["SEX//F", "SEX//M"].map(Arc::from);
    let birth: Arc<str> = BIRTH_CODE.into();
    let path = root.join(format!("data/{shard:05}.parquet"));
    let mut writer = ShardWriter::create(&path, ShardOptions::default())?;
    let first = shard * PATIENTS_PER_SHARD;
    for patient in first..(first + PATIENTS_PER_SHARD).min(options.patients) {
        let mut random = Random(patient as u64 ^ 0xCA10_0000_0000);
        let mut events = Vec::with_capacity(options.events + 2);
        let row = |time_us, code: &Arc<str>, numeric_value, site: &Arc<str>| Event {
            time_us,
            code: code.clone(),
            numeric_value,
            text_value: None,
            site: Some(site.clone()),
            items: None,
        };
        events.push(row(None, &sexes[random.below(2) as usize], None, &sites[0]));
        let born = -(random.below(20_000) as i64) * MICROSECONDS_PER_DAY;
        events.push(row(Some(born), &birth, None, &sites[0]));
        let mut days: Vec<u64> = (0..options.events).map(|_| random.below(7_300)).collect();
        days.sort_unstable();
        for day in days {
            let time = (12_000 + day as i64) * MICROSECONDS_PER_DAY;
            // Frequent codes are far more frequent than rare ones.
            let code = random.below(CODES) * random.below(CODES) / CODES;
            let number = (random.below(3) > 0).then(|| random.below(4_000) as f32 / 10.0);
            let site = &sites[random.below(3) as usize];
            events.push(row(Some(time), &codes[code as usize], number, site));
        }
        writer.write(&Patient {
            subject_id: patient as i64,
            events,
        })?;
    }
    writer.finish()?;
    Ok(())
}

/// Reads all events on all cores; the number of rows.
fn stream(cohort: &Cohort) -> Result<u64> {
    let chunks = cohort.chunks(1 << 20);
    let next = AtomicUsize::new(0);
    let rows = AtomicU64::new(0);
    let threads = std::thread::available_parallelism()?.get();
    std::thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                        for patient in cohort.read_chunk(chunk, &|_| true)? {
                            let events = patient?.events.len() as u64;
                            rows.fetch_add(events, Ordering::Relaxed);
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        for worker in workers {
            match worker.join() {
                Ok(result) => result?,
                Err(_) => return Err("a thread that read shards panicked".into()),
            }
        }
        Ok(())
    })?;
    Ok(rows.into_inner())
}

/// Collates one shuffled epoch of the training split; its tokens.
fn epoch(
    prepared: &Arc<calor_sequence::Prepared>,
    tokenizer: &PatientTokenizer,
    max_tokens: usize,
) -> Result<u64> {
    let options = PlanOptions {
        order: Order::Shuffled { seed: 0, epoch: 0 },
        global_batch: 256,
        micro_batch: 32,
        max_tokens,
        packing: true,
    };
    let plan = BatchPlan::new(prepared, &prepared.split(Split::Train), options)?;
    let expected = plan.tokens();
    let steps = plan.steps();
    let steps = (0..steps).map(move |step| plan.step(step));
    let items = Arc::new(ItemStore::none());
    let batches = Prefetcher::new(prepared.clone(), items, steps, tokenizer.pad_id(), 1, 4)?;
    let mut tokens = 0;
    for batch in batches {
        tokens += batch?.batch.token_count as u64;
    }
    ensure(tokens == expected, "tokens were lost in collating")?;
    Ok(tokens)
}

/// A WordPiece tokenizer whose words are those of this cohort, with single digits and letters as
/// pieces.
fn write_tokenizer(root: &Path) -> Result<PathBuf> {
    let folder = root.join("tokenizer");
    std::fs::create_dir_all(&folder)?;
    let specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let words = [
        "year", "years", "month", "months", "week", "weeks", "day", "days", "old", "man", "woman",
        "ago", "later", "very", "high", "low", "normal", "and",
    ];
    let mut vocab: Vec<String> = specials.map(String::from).to_vec();
    vocab.extend(words.iter().chain(&WORDS).map(|word| (*word).to_string()));
    for symbol in '!'..='~' {
        vocab.push(symbol.to_string());
        vocab.push(format!("##{symbol}"));
    }
    let ids: serde_json::Map<String, Value> = vocab
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let added: Vec<Value> = specials
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            })
        })
        .collect();
    let piece = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let template = json!([
        piece("[CLS]"),
        {"Sequence": {"id": "A", "type_id": 0}},
        piece("[SEP]"),
    ]);
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": template, "pair": template,
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": ids,
        },
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string())?;
    Ok(folder)
}

/// Starts a new peak of the resident set from what it is now. Where the kernel does not allow it,
/// the peak stays that of the whole run.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The largest resident set since the last reset.
fn peak_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| {
        format!("peak memory is read from /proc, which only Linux has: {error}")
    })?;
    let kib: u64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or("/proc/self/status has no VmHWM")?;
    Ok(kib * 1024)
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() {
            folder_bytes(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(bytes)
}
