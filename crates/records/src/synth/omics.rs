//! Omics: expression of 200 genes in ten pathways, written as a CSV file with the genes' names and
//! one row.

use super::model::{Draw, Latent};
use super::random::{Draws, Stream};

pub(super) const PATHWAYS: usize = 10;
pub(super) const GENES_PER_PATHWAY: usize = 20;

/// Positions of the pathways that carry factors: P03 and P07.
const PATHWAY_OF_FACTOR: usize = 2;
const PATHWAY_OF_SWITCH: usize = 6;
const SHIFT_BY_SWITCH: f64 = 0.8;
/// Standard deviation, over patients, of the mean of a pathway that carries nothing.
const NUISANCE: f64 = 0.5;
/// Standard deviation of a gene about the mean of its pathway: small beside what its pathway shares,
/// so that ten numbers say what 200 do and a small encoder finds them.
const NOISE: f64 = 0.15;

/// Names of the genes: `P03_G07`.
pub(super) fn genes(pathway: usize) -> impl Iterator<Item = String> {
    (1..=GENES_PER_PATHWAY).map(move |gene| format!("{}_G{gene:02}", pathway_name(pathway)))
}

pub(super) fn pathway_name(pathway: usize) -> String {
    format!("P{:02}", pathway + 1)
}

/// The pathways and their genes in the Gene Matrix Transposed format.
pub(super) fn gmt() -> String {
    (0..PATHWAYS)
        .map(|pathway| {
            let genes: Vec<String> = genes(pathway).collect();
            format!(
                "{}\tsynthetic\t{}\n",
                pathway_name(pathway),
                genes.join("\t")
            )
        })
        .collect()
}

/// Expression by gene, pathway after pathway.
pub(super) fn values(seed: u64, draw: &Draw) -> Vec<f64> {
    let mut draws = Draws::of(seed, draw.subject_id, Stream::Omics);
    let mut values = Vec::with_capacity(PATHWAYS * GENES_PER_PATHWAY);
    for pathway in 0..PATHWAYS {
        let nuisance = NUISANCE * draws.noise();
        let shift = match pathway {
            PATHWAY_OF_FACTOR => draw.value(Latent::Pathway),
            PATHWAY_OF_SWITCH => SHIFT_BY_SWITCH * draw.value(Latent::Switch),
            _ => nuisance,
        };
        for gene in 0..GENES_PER_PATHWAY {
            // Each gene has a level of its own, the same for everyone.
            let level = 6.0 + (pathway * GENES_PER_PATHWAY + gene) as f64 * 7.0 % 11.0 / 4.0;
            values.push(level + shift + NOISE * draws.noise());
        }
    }
    values
}

/// Its first line.
pub(super) fn csv_header() -> String {
    let genes: Vec<String> = (0..PATHWAYS).flat_map(genes).collect();
    genes.join(",") + "\n"
}

/// The file: `header` and the values with three decimals.
pub(super) fn csv(header: &str, values: &[f64]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(header.len() + 8 * values.len());
    bytes.extend_from_slice(header.as_bytes());
    for (position, value) in values.iter().enumerate() {
        if position > 0 {
            bytes.push(b',');
        }
        push_thousandths(&mut bytes, (value * 1000.0).round() as i64);
    }
    bytes.push(b'\n');
    bytes
}

/// Writes a number of thousandths as a decimal: the formatter of the standard library takes five
/// times as long, and there are 200 of these to a patient.
fn push_thousandths(bytes: &mut Vec<u8>, thousandths: i64) {
    if thousandths < 0 {
        bytes.push(b'-');
    }
    let magnitude = thousandths.unsigned_abs();
    let mut digits = [b'0'; 20];
    let mut rest = magnitude;
    let mut first = digits.len();
    while rest > 0 || digits.len() - first < 4 {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let point = digits.len() - 3;
    bytes.extend_from_slice(&digits[first..point]);
    bytes.push(b'.');
    bytes.extend_from_slice(&digits[point..]);
}

#[cfg(test)]
mod tests {
    use super::super::model::Model;
    use super::super::options::SynthOptions;
    use super::super::testing::correlation;
    use super::*;

    #[test]
    fn pathway_and_switch_can_be_read_back() {
        let model = Model::new(&SynthOptions::default());
        let (mut found, mut drawn) = (Vec::new(), Vec::new());
        let (mut high, mut low) = (f64::MAX, f64::MIN);
        for subject_id in 0..500 {
            let draw = model.draw(subject_id);
            let values = values(0, &draw);
            let sum = |pathway: usize| -> f64 {
                values[pathway * GENES_PER_PATHWAY..][..GENES_PER_PATHWAY]
                    .iter()
                    .sum()
            };
            found.push(sum(PATHWAY_OF_FACTOR));
            drawn.push(draw.value(Latent::Pathway));
            if draw.value(Latent::Switch) > 0.0 {
                high = high.min(sum(PATHWAY_OF_SWITCH));
            } else {
                low = low.max(sum(PATHWAY_OF_SWITCH));
            }
        }
        assert!(correlation(&found, &drawn) > 0.995);
        // The two values of the sign are far apart.
        assert!(high > low + 5.0, "{high} {low}");
    }

    #[test]
    fn the_csv_holds_the_values() {
        assert_eq!(csv("A,B,C,D\n", &[1.2344, -0.0004, -12.0, 0.05]), {
            b"A,B,C,D\n1.234,0.000,-12.000,0.050\n"
        });
        let header = csv_header();
        assert_eq!(header.trim_end().split(',').count(), 200);
        assert!(header.starts_with("P01_G01,P01_G02,"));
        assert!(header.ends_with(",P10_G20\n"));
        let values = values(0, &Model::new(&SynthOptions::default()).draw(3));
        let text = String::from_utf8(csv(&header, &values)).unwrap();
        let line = text.lines().nth(1).unwrap();
        for (cell, value) in line.split(',').zip(&values) {
            assert!((cell.parse::<f64>().unwrap() - value).abs() < 6e-4);
        }
    }

    #[test]
    fn the_pathways_are_listed_with_their_genes() {
        let gmt = gmt();
        let lines: Vec<Vec<&str>> = gmt.lines().map(|line| line.split('\t').collect()).collect();
        assert_eq!(lines.len(), PATHWAYS);
        assert_eq!(lines[6][0], "P07");
        assert_eq!(lines[6].len(), 2 + GENES_PER_PATHWAY);
        assert_eq!(lines[6][2], "P07_G01");
    }
}
