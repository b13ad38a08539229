use super::super::*;
use super::*;

const COMPLETE: &str = r#"# calor train recipes/x.toml
schema = 1
name = "x"

[model]
id = "some/model"

[task]
kind = "binary"
labels = "death_5y"

[cohort]
path = "data/x"

[train]
learning_rate = 3e-4
schedule = { kind = "linear", warmup_fraction = 0.1 }
"#;

fn read(text: &str, set: &[&str]) -> Result<Recipe, RecipeError> {
    Recipe::parse(
        text,
        Path::new("x.toml"),
        &set.iter()
            .map(|text| (*text).to_owned())
            .collect::<Vec<_>>(),
    )
}

fn complaint(text: &str, set: &[&str]) -> String {
    read(text, set).unwrap_err().to_string()
}

#[test]
fn a_complete_recipe_is_read_and_its_gaps_are_filled() {
    let recipe = read(COMPLETE, &[]).unwrap();
    assert_eq!(recipe.train.learning_rate, 3e-4);
    assert_eq!(recipe.train.head_learning_rate, Some(3e-4));
    assert_eq!(recipe.train.schedule.kind, ScheduleKind::Linear);
    assert_eq!(recipe.evaluate.metric, Some(Metric::Auroc));
    assert_eq!(recipe.train.checkpoint_every_steps, Some(100));
    assert!(recipe.cohort.path.is_absolute());
}

#[test]
fn what_is_written_back_is_read_as_the_same_recipe() {
    let mut text = COMPLETE.to_owned();
    text.push_str("[adapter]\nrank_pattern = { \"z_proj\" = 4, \"a_proj\" = 8 }\ntargets = [\"query\", \"value\"]\n");
    let recipe = read(&text, &["task.class_weights=balanced", "train.max_steps=7"]).unwrap();
    let written = recipe.to_toml("calor train here");
    assert!(
        written.starts_with("# calor train here\nschema = 1\n"),
        "{written}"
    );
    assert_eq!(read(&written, &[]).unwrap(), recipe);
    let names: Vec<&str> = recipe
        .adapter
        .rank_pattern
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(
        names,
        ["z_proj", "a_proj"],
        "patterns keep the order of the file"
    );
}

#[test]
fn every_key_is_documented_and_every_documented_key_exists() {
    let known = keys();
    for key in &known {
        assert!(
            key.doc.trim().ends_with('.'),
            "{} is not documented in whole sentences",
            key.path
        );
    }
    // All keys that serde knows, from a recipe with every optional key set.
    let mut recipe = read(
        COMPLETE,
        &[
            "model.revision=main",
            "cohort.synth={}",
            "adapter.targets=[\"query\"]",
            "adapter.layers_to_transform=[0]",
            "train.lora_plus_ratio=4",
            "train.max_steps=1",
            "train.schedule.warmup_steps=2",
            "train.schedule.kind=wsd",
            "train.schedule.decay_steps=2",
            "train.optimizer=sgd",
            "train.momentum=0.5",
            "train.nesterov=true",
            "train.ema_decay=0.9",
            "energy.grid_intensity_g_per_kwh=100",
            "modality.image={}",
            "modality.waveform={}",
            "modality.series={}",
            "modality.omics={}",
            "modality.omics.groups={ kind = \"prefix\", separator = \"_\" }",
            "modality.speech={}",
        ],
    )
    .unwrap();
    recipe.extends = Some("base.toml".into());
    recipe.train.schedule.warmup_fraction = Some(0.5);
    recipe.train.schedule.decay_fraction = Some(0.5);
    // No recipe has these beside a cohort with labels.
    recipe.task.notes = vec!["NOTE//*".to_owned()];
    for file in [
        &mut recipe.text.train,
        &mut recipe.text.tuning,
        &mut recipe.text.held_out,
    ] {
        *file = Some("rows.jsonl".into());
    }
    let table: toml::Table = recipe.to_toml("x").parse().unwrap();
    let mut found = Vec::new();
    fn collect(table: &toml::Table, prefix: &str, known: &[Key], found: &mut Vec<String>) {
        for (name, value) in table {
            let path = format!("{prefix}{name}");
            let kind = known
                .iter()
                .find(|key| key.path == path)
                .unwrap_or_else(|| panic!("{path} is not documented"))
                .kind;
            if kind == KeyKind::Section {
                collect(value.as_table().unwrap(), &format!("{path}."), known, found);
            }
            found.push(path);
        }
    }
    collect(&table, "", &known, &mut found);
    found.sort();
    let mut documented: Vec<String> = known.iter().map(|key| key.path.to_owned()).collect();
    documented.sort();
    assert_eq!(found, documented);
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_key() {
    let text = COMPLETE.replace("learning_rate", "learing_rate");
    assert_eq!(
        complaint(&text, &[]),
        "x.toml:16: unknown key `train.learing_rate`; did you mean `train.learning_rate`?"
    );
    let text = format!("{COMPLETE}r = 8\n");
    assert_eq!(
        complaint(&text, &[]),
        "x.toml:18: unknown key `train.r`; did you mean `adapter.r`?"
    );
    let text = COMPLETE.replace("warmup_fraction", "warmup_frction");
    assert_eq!(
        complaint(&text, &[]),
        "x.toml:17: unknown key `train.schedule.warmup_frction`; did you mean `train.schedule.warmup_fraction`?"
    );
    let text = format!("{COMPLETE}[adaptor]\nr = 8\n");
    assert_eq!(
        complaint(&text, &[]),
        "x.toml:18: unknown key `adaptor`; did you mean `adapter`?"
    );
    let text = format!("{COMPLETE}[cohort2]\n[task.qwertz]\n");
    let found = complaint(&text, &[]);
    assert!(found.contains("did you mean `cohort`?"), "{found}");
    assert!(
        found.contains("unknown key `task.qwertz`; [task] has `kind`, `labels`"),
        "{found}"
    );
}

#[test]
fn wrong_types_choices_and_syntax_are_named_with_their_line() {
    let found = complaint(&COMPLETE.replace("3e-4", "\"fast\""), &[]);
    assert!(
        found.starts_with("x.toml:16: `train.learning_rate`: invalid type: string"),
        "{found}"
    );
    let found = complaint(&COMPLETE.replace("\"binary\"", "\"binry\""), &[]);
    assert!(
        found.starts_with("x.toml:9: `task.kind`: unknown choice `binry`"),
        "{found}"
    );
    assert!(found.ends_with("did you mean `binary`?"), "{found}");
    let found = complaint(&COMPLETE.replace("\"death_5y\"", "7"), &[]);
    assert!(
        found.contains(
            "x.toml:10: `task.labels`: expected the name of a label set or a list of names"
        ),
        "{found}"
    );
    let found = complaint(&COMPLETE.replace("name = \"x\"", "name = "), &[]);
    assert!(found.starts_with("x.toml:3: "), "{found}");
    let found = complaint(
        &COMPLETE.replace("[model]\nid = \"some/model\"", "model = \"some/model\""),
        &[],
    );
    assert!(
        found.contains("`model` is a section, not string; write `[model]`"),
        "{found}"
    );
    let found = complaint(&COMPLETE.replace("schema = 1", "schema = -1"), &[]);
    assert!(found.starts_with("x.toml:2: `schema`"), "{found}");
}

#[test]
fn missing_keys_are_all_named() {
    let found = complaint("schema = 1\nname = \"x\"\n[task]\nkind = \"binary\"\n", &[]);
    for key in ["model.id", "task.labels", "cohort.path"] {
        assert!(found.contains(&format!("`{key}` is missing")), "{found}");
    }
    assert!(
        read(
            "schema = 1\nname = \"x\"\n[task]\nkind = \"binary\"\n",
            &["model.id=m", "task.labels=l", "cohort.path=c"]
        )
        .is_ok()
    );
}

#[test]
fn assignments_are_typed_against_the_recipe() {
    let recipe = read(
        COMPLETE,
        &[
            "train.learning_rate=1",
            "name=run 7",
            "task.labels=[\"a\", \"b\"]",
            "task.kind=multilabel",
            "sequence.packing=false",
            "adapter.rank_pattern.query=4",
            "train.schedule.warmup_steps=9",
        ],
    )
    .unwrap();
    assert_eq!(recipe.train.learning_rate, 1.0);
    assert_eq!(recipe.name, "run 7");
    assert_eq!(recipe.task.labels.names(), ["a", "b"]);
    assert!(!recipe.sequence.packing);
    assert_eq!(recipe.adapter.rank_pattern, [("query".to_owned(), 4)]);
    assert_eq!(
        (
            recipe.train.schedule.warmup_steps,
            recipe.train.schedule.warmup_fraction
        ),
        (Some(9), None)
    );

    assert_eq!(
        complaint(COMPLETE, &["train.epochs=three"]),
        "--set train.epochs=three: `three` is not a whole number"
    );
    let found = complaint(COMPLETE, &["train.epochs=\"3\""]);
    assert!(
        found.starts_with("--set train.epochs=\"3\": `train.epochs`: invalid type: string"),
        "{found}"
    );
    assert_eq!(
        complaint(COMPLETE, &["train.epoch=3"]),
        "--set train.epoch=3: unknown key `train.epoch`; did you mean `train.epochs`?"
    );
    assert_eq!(
        complaint(COMPLETE, &["train.epochs"]),
        "--set train.epochs: there is no `=`; write `--set section.key=value`"
    );
    let found = complaint(COMPLETE, &["adapter.r=0"]);
    assert!(
        found.starts_with("--set adapter.r=0: `adapter.r`"),
        "{found}"
    );
    let found = complaint(COMPLETE, &["train.schedule={ knd = \"linear\" }"]);
    assert!(
        found.contains("did you mean `train.schedule.kind`?"),
        "{found}"
    );
}
