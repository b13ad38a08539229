//! One recipe on top of another: `extends = "base.toml"`, one level deep.

use std::collections::BTreeMap;
use std::path::Path;

use super::parse::{Reader, remove, replaced_by};
use super::{KeyKind, Place, Problem};

/// The key that names the base.
pub(super) const EXTENDS: &str = "extends";

/// What files say, with the file and line of every key.
pub(super) struct Document {
    pub table: toml::Table,
    pub places: BTreeMap<String, Place>,
}

impl Document {
    /// With the keys of the recipe that it extends, if it does, below its own.
    ///
    /// # Errors
    /// A base that cannot be read, is wrong itself, or extends a third recipe.
    pub fn extended(
        mut self,
        reader: &Reader,
    ) -> Result<(toml::Table, BTreeMap<String, Place>), Vec<Problem>> {
        let Some(named) = self.table.remove(EXTENDS) else {
            return Ok((self.table, self.places));
        };
        let named = named.as_str().unwrap_or_default().to_owned();
        let place = self.places.remove(EXTENDS).expect("every key has a place");
        let folder = reader.path.parent().unwrap_or(Path::new(""));
        let base_reader = Reader::new(&folder.join(&named));
        let text = std::fs::read_to_string(&base_reader.path).map_err(|error| {
            let message = format!(
                "`extends`: cannot read {}: {error}",
                base_reader.path.display()
            );
            let hint = "give its path relative to this file";
            vec![reader.problem(place.clone(), EXTENDS, message, hint)]
        })?;
        let base = base_reader.document(&text)?;
        if let Some(deeper) = base.places.get(EXTENDS) {
            let message = format!(
                "`extends` is in a recipe that {} extends",
                reader.path.display()
            );
            let hint = "a base stands on its own: take its keys into this file";
            return Err(vec![reader.problem(deeper.clone(), EXTENDS, message, hint)]);
        }
        let Document {
            mut table,
            mut places,
        } = base;
        for key in self.places.keys() {
            // A length given in one way takes the place of the base's in the other.
            if let Some(other) = replaced_by(key) {
                remove(&mut table, other);
                places.remove(other);
            }
        }
        overlay(&mut table, self.table, "", reader);
        places.extend(self.places);
        Ok((table, places))
    }
}

/// Puts `over` on top: sections key by key, everything else as a whole.
fn overlay(below: &mut toml::Table, over: toml::Table, prefix: &str, reader: &Reader) {
    for (name, value) in over {
        let path = format!("{prefix}{name}");
        let section = reader
            .keys
            .iter()
            .any(|key| key.path == path && key.kind == KeyKind::Section);
        match (below.get_mut(&name), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(over)) if section => {
                overlay(below, over, &format!("{path}."), reader);
            }
            (_, value) => {
                below.insert(name, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::recipe::Recipe;

    const BASE: &str = "schema = 1\nname = \"base\"\n[model]\nid = \"m\"\n[task]\nkind = \"binary\"\nlabels = \"l\"\n[cohort]\npath = \"c\"\n[train]\nepochs = 7\nlearning_rate = 1e-3\nschedule = { kind = \"linear\", warmup_fraction = 0.1 }\n[adapter]\nrank_pattern = { query = 4 }\n";

    /// What a recipe on top of a base gives; errors with the folder's name taken out.
    fn load(base: &str, own: &str, set: &[&str]) -> Result<Recipe, String> {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("own.toml");
        fs::create_dir(home.path().join("shared")).unwrap();
        fs::write(home.path().join("shared/base.toml"), base).unwrap();
        fs::write(&path, own).unwrap();
        let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        Recipe::load(&path, &set).map_err(|error| {
            let folder = format!("{}/", home.path().display());
            error.to_string().replace(&folder, "")
        })
    }

    #[test]
    fn own_keys_stand_on_those_of_the_base() {
        let own = "extends = \"shared/base.toml\"\nname = \"own\"\n[train]\nlearning_rate = 2e-3\nschedule = { warmup_steps = 5 }\n[adapter]\nrank_pattern = { value = 8 }\n";
        let recipe = load(BASE, own, &["train.micro_batch=3"]).unwrap();
        assert_eq!(recipe.name, "own");
        assert_eq!((recipe.train.epochs, recipe.train.learning_rate), (7, 2e-3));
        assert_eq!(recipe.train.micro_batch, 3);
        let schedule = &recipe.train.schedule;
        assert_eq!(schedule.kind, crate::recipe::ScheduleKind::Linear);
        assert_eq!(
            (schedule.warmup_steps, schedule.warmup_fraction),
            (Some(5), None)
        );
        assert_eq!(recipe.adapter.rank_pattern, [("value".to_owned(), 8)]);
        // What is written back is complete and extends nothing.
        let written = recipe.to_toml("x");
        assert!(!written.contains("extends"), "{written}");
        assert!(written.contains("epochs = 7"), "{written}");
    }

    #[test]
    fn errors_name_the_file_and_line_that_a_key_came_from() {
        let own = "extends = \"shared/base.toml\"\nname = \"own\"\n";
        let found = load(&BASE.replace("epochs = 7", "epochs = 0"), own, &[]).unwrap_err();
        assert!(
            found.starts_with("shared/base.toml:11: `train.epochs`"),
            "{found}"
        );
        let found = load(&BASE.replace("epochs", "epoch"), own, &[]).unwrap_err();
        assert!(
            found.starts_with("shared/base.toml:11: unknown key `train.epoch`"),
            "{found}"
        );
        let wrong = format!("{own}[train]\nepochs = 0\n");
        let found = load(BASE, &wrong, &[]).unwrap_err();
        assert!(found.starts_with("own.toml:4: `train.epochs`"), "{found}");
        let found = load(&BASE.replace("id = \"m\"\n", ""), own, &[]).unwrap_err();
        assert!(
            found.starts_with("own.toml: `model.id` is missing"),
            "{found}"
        );
    }

    #[test]
    fn a_base_has_to_be_there_and_cannot_extend_another() {
        let own = "extends = \"shared/base.toml\"\n";
        let deeper = format!("extends = \"../own.toml\"\n{BASE}");
        let found = load(&deeper, own, &[]).unwrap_err();
        assert!(
            found.starts_with("shared/base.toml:1: `extends` is in a recipe that own.toml extends"),
            "{found}"
        );
        let found = load(BASE, "name = \"x\"\nextends = \"base.toml\"\n", &[]).unwrap_err();
        assert!(
            found.starts_with("own.toml:2: `extends`: cannot read base.toml"),
            "{found}"
        );
        let found = load(BASE, own, &["extends=other.toml"]).unwrap_err();
        assert!(found.contains("`extends` cannot be set"), "{found}");
    }
}
