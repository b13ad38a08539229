use std::sync::atomic::AtomicUsize;

use calor_records::{Event, ItemPath, Modality, Patient};

use super::*;
use crate::batch::collate;
use crate::labels::TaskLabels;
use crate::options::SequenceOptions;
use crate::plan::MicroBatch;
use crate::stream::StreamOptions;
use crate::testing::{DAY_US, event, tokenizer, wordpiece, write_cohort};

/// Four patients, each with an "image": a text file of two numbers. The third has none.
struct Setting {
    folder: tempfile::TempDir,
    prepared: Prepared,
    decoded: Arc<AtomicUsize>,
}

impl Setting {
    fn new() -> Setting {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("images")).unwrap();
        let patients: Vec<Patient> = (0..4)
            .map(|subject_id| {
                let path = format!("images/{subject_id}.txt");
                let numbers = format!("{subject_id} {}", 10 * subject_id);
                std::fs::write(folder.path().join(&path), numbers).unwrap();
                let mut events = vec![event(None, "old", None)];
                if subject_id != 2 {
                    events.push(Event {
                        items: Some(Box::new([ItemPath {
                            modality: Modality::Image,
                            path: path.as_str().into(),
                        }])),
                        ..event(Some(DAY_US), "IMAGE", None)
                    });
                }
                Patient { subject_id, events }
            })
            .collect();
        let (cohort, labels) = write_cohort(folder.path(), &patients, 1, &[3]);
        let options = SequenceOptions {
            streams: vec![StreamOptions {
                tokens: 2,
                ..StreamOptions::new(Modality::Image)
            }],
            ..Default::default()
        };
        let prepared = crate::prepare(
            &cohort,
            &TaskLabels::binary("task", &labels).unwrap(),
            &tokenizer(&wordpiece(), None),
            &options,
            None,
            &folder.path().join("cache"),
            &|_| {},
        )
        .unwrap();
        Setting {
            folder,
            prepared,
            decoded: Arc::default(),
        }
    }

    fn store(&self, key: &str, on_missing: MissingItem, memory_bytes: u64) -> ItemStore {
        let counted = self.decoded.clone();
        let decode = move |path: &Path| {
            counted.fetch_add(1, Ordering::SeqCst);
            let text = std::fs::read_to_string(path).map_err(|source| RecordsError::Io {
                path: path.to_owned(),
                source,
            })?;
            let numbers = text.split(' ').map(|number| number.parse().unwrap());
            Ok(Decoded {
                shape: vec![2],
                values: numbers.collect(),
                cut_s: 0.5,
                layout: 0,
            })
        };
        let decoding = Decoding {
            on_missing,
            standardise: true,
            clip: (key == CLIPPED).then_some(0.5),
            ..Decoding::new(key.to_owned(), Arc::new(decode))
        };
        let cache = self.folder.path().join("cache");
        ItemStore::new(
            self.folder.path(),
            &cache,
            vec![Some(decoding)],
            memory_bytes,
        )
    }

    fn batch(&self) -> HostBatch {
        let micro = MicroBatch {
            rows: vec![vec![0, 1], vec![2, 3]],
        };
        collate(&self.prepared, &micro, 7, 1)
    }

    fn times_decoded(&self) -> usize {
        self.decoded.swap(0, Ordering::SeqCst)
    }
}

/// The key of a store that cuts what it standardises.
const CLIPPED: &str = "clipped";

fn values(batch: &HostBatch) -> Vec<Option<Vec<f32>>> {
    let content = |item: &crate::PlacedItem| match &item.content {
        ItemContent::Decoded(decoded) => Some(decoded.values.clone()),
        ItemContent::Missing => None,
        other => panic!("{other:?}"),
    };
    batch.items.iter().map(content).collect()
}

#[test]
fn items_stand_where_their_soft_tokens_are() {
    let setting = Setting::new();
    let batch = setting.batch();
    assert_eq!(batch.items.len(), 4);
    for (item, span) in batch.items.iter().zip(&batch.spans) {
        // [CLS], then the soft tokens, then text.
        assert_eq!((item.row, item.start), (span.row, span.start + 1));
        let first = item.row * batch.seq + item.start;
        assert_eq!(batch.input_ids[first - 1], 2);
        assert_eq!(batch.input_ids[first..first + 2], [7, 7]);
        assert_ne!(batch.input_ids[first + 2], 7);
        assert_eq!(batch.segments[first], batch.segments[first + 2]);
    }
    assert_eq!(batch.items[0].days_before, Some(2.0));
    assert_eq!(batch.items[2].content, ItemContent::Missing);
    let counts = setting.prepared.report().modalities["image"];
    assert_eq!((counts.items, counts.missing_samples), (3, 1));
}

#[test]
fn values_are_cut_after_they_are_standardised() {
    let setting = Setting::new();
    let mut wide = setting.batch();
    let mut narrow = setting.batch();
    for (key, batch) in [("wide", &mut wide), (CLIPPED, &mut narrow)] {
        let mut store = setting.store(key, MissingItem::Error, 0);
        let training = setting.prepared.split(calor_records::Split::Train);
        store.fit_scalings(&setting.prepared, &training).unwrap();
        store.fill(batch).unwrap();
    }
    let cut = |values: Vec<f32>| values.iter().map(|value| value.clamp(-0.5, 0.5)).collect();
    let expected: Vec<Option<Vec<f32>>> = values(&wide)
        .into_iter()
        .map(|item| item.map(cut))
        .collect();
    assert_eq!(values(&narrow), expected);
    assert_ne!(values(&narrow), values(&wide));
}

#[test]
fn a_file_is_decoded_once_and_again_when_it_or_the_options_change() {
    let setting = Setting::new();
    let mut batch = setting.batch();
    let store = setting.store("a", MissingItem::Error, 0);
    store.fill(&mut batch).unwrap();
    let expected = [
        Some(vec![0.0, 0.0]),
        Some(vec![1.0, 10.0]),
        None,
        Some(vec![3.0, 30.0]),
    ];
    assert_eq!(values(&batch), expected);
    assert_eq!(setting.times_decoded(), 3);
    assert_eq!(store.cut(), (3, 1.5));

    let mut again = setting.batch();
    setting
        .store("a", MissingItem::Error, 0)
        .fill(&mut again)
        .unwrap();
    assert_eq!(again, batch);
    assert_eq!(setting.times_decoded(), 0, "kept on the disk");

    setting
        .store("b", MissingItem::Error, 0)
        .fill(&mut setting.batch())
        .unwrap();
    assert_eq!(setting.times_decoded(), 3, "other options");

    std::fs::write(setting.folder.path().join("images/1.txt"), "100 200").unwrap();
    let mut changed = setting.batch();
    setting
        .store("a", MissingItem::Error, 0)
        .fill(&mut changed)
        .unwrap();
    assert_eq!(setting.times_decoded(), 1, "another file");
    assert_eq!(values(&changed)[1], Some(vec![100.0, 200.0]));
}

#[test]
fn a_damaged_entry_of_the_cache_is_decoded_anew() {
    let setting = Setting::new();
    let path: Arc<str> = "images/3.txt".into();
    let store = setting.store("a", MissingItem::Error, 0);
    let whole = store.load(0, &path).unwrap();
    setting.times_decoded();
    let items = setting.folder.path().join("cache/items");
    let folder = std::fs::read_dir(items)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let entry = std::fs::read_dir(folder)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let bytes = std::fs::read(&entry).unwrap();
    for position in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[position] ^= 1;
        std::fs::write(&entry, &damaged).unwrap();
        assert_eq!(store.load(0, &path).unwrap(), whole);
        assert_eq!(setting.times_decoded(), 1, "byte {position}");
        assert_eq!(std::fs::read(&entry).unwrap(), bytes);
    }
    for length in 0..bytes.len() {
        assert_eq!(parse(&bytes[..length]), None);
    }
}

#[test]
fn memory_holds_what_fits() {
    let setting = Setting::new();
    let store = setting.store("a", MissingItem::Error, 16);
    store.fill(&mut setting.batch()).unwrap();
    assert_eq!(store.held.lock().unwrap().len(), 2);
    let first = store.load(0, &"images/0.txt".into()).unwrap().unwrap();
    assert_eq!(first.values, [0.0, 0.0]);
}

#[test]
fn a_file_that_is_not_there_is_an_error_or_counted() {
    let setting = Setting::new();
    std::fs::remove_file(setting.folder.path().join("images/1.txt")).unwrap();
    let error = setting
        .store("a", MissingItem::Error, 0)
        .fill(&mut setting.batch())
        .unwrap_err();
    assert!(error.to_string().contains("images/1.txt"), "{error}");
    let store = setting.store("a", MissingItem::Absent, 0);
    for _ in 0..2 {
        let mut batch = setting.batch();
        store.fill(&mut batch).unwrap();
        assert_eq!(batch.items[1].content, ItemContent::Missing);
    }
    assert_eq!(store.absent(), [1], "each file once");
}

#[test]
fn channels_are_standardised_with_training_items_alone() {
    let setting = Setting::new();
    let mut store = setting.store("a", MissingItem::Error, 0);
    // The first two of every four patients are for training.
    let training = setting.prepared.split(calor_records::Split::Train);
    store.fit_scalings(&setting.prepared, &training).unwrap();
    let scaling = store.scalings()[0].clone().unwrap();
    assert_eq!(scaling.mean, [0.5, 5.0]);
    assert_eq!(scaling.deviation, [0.5, 5.0]);
    let mut batch = setting.batch();
    store.fill(&mut batch).unwrap();
    assert_eq!(values(&batch)[0], Some(vec![-1.0, -1.0]));
    assert_eq!(values(&batch)[3], Some(vec![5.0, 5.0]));
    let mut other = setting.store("a", MissingItem::Error, 0);
    other.set_scalings(vec![Some(scaling)]);
    let mut same = setting.batch();
    other.fill(&mut same).unwrap();
    assert_eq!(same, batch);
}
