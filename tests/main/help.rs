//! What every verb says about itself.

use crate::support::Workplace;

/// The verbs that `calor … --help` lists, `help` aside.
fn verbs(workplace: &Workplace, of: &[String]) -> Vec<Vec<String>> {
    let help = workplace
        .run(of.iter().map(String::as_str).chain(["--help"]))
        .done()
        .stdout;
    let listed = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty());
    listed
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .flat_map(|verb| {
            let path: Vec<String> = of.iter().cloned().chain([verb.to_owned()]).collect();
            let mut below = verbs(workplace, &path);
            below.insert(0, path);
            below
        })
        .collect()
}

#[test]
fn every_verb_explains_itself() {
    let workplace = Workplace::empty();
    let verbs = verbs(&workplace, &[]);
    for verb in [
        "devices",
        "fetch",
        "cohort inspect",
        "cohort validate",
        "init",
        "schema",
        "check",
        "train",
        "evaluate",
        "predict",
        "merge",
        "generate",
        "parity",
        "bench step",
        "report",
    ] {
        assert!(
            verbs.iter().any(|path| path.join(" ") == verb),
            "`calor {verb}` is not there"
        );
    }
    let mut text = String::new();
    for path in std::iter::once(Vec::new()).chain(verbs) {
        let help = workplace
            .run(path.iter().map(String::as_str).chain(["--help"]))
            .done();
        assert_eq!(help.stderr, "");
        let title = [vec!["calor".to_owned()], path].concat().join(" ");
        text.push_str(&format!("=== {title} --help\n{}\n", help.stdout));
    }
    assert_snapshot!(text);
}

#[test]
fn the_version_is_the_packages() {
    let ended = Workplace::empty().run(["--version"]).done();
    assert_eq!(
        ended.stdout,
        format!("calor {}\n", env!("CARGO_PKG_VERSION"))
    );
}
