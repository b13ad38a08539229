//! Scratch.
fn main() {
    for path in std::env::args().skip(1) {
        let path = std::path::PathBuf::from(path);
        let start = std::time::Instant::now();
        let found = calor_records::read_omics(&path, &calor_records::OmicsOptions::default());
        let took = start.elapsed();
        let names = calor_records::omics_features(&path);
        match (found, names) {
            (Ok(found), Ok(names)) => println!(
                "{}: {} {:?} {:?} sum {} in {took:?}",
                path.display(),
                found.values.len(),
                &names[..2],
                &found.values[..2],
                found
                    .values
                    .iter()
                    .filter(|v| !v.is_nan())
                    .map(|v| f64::from(*v))
                    .sum::<f64>()
            ),
            (found, names) => println!("{}: {:?} {:?}", path.display(), found.err(), names.err()),
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    println!(
        "{}",
        status.lines().find(|l| l.starts_with("VmHWM")).unwrap()
    );
}
