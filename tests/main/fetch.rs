//! `calor fetch` without a network, and against a hub of our own.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

use crate::support::{Ended, Workplace, write_checkpoint};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves the files of one repository, `owner/small`, as the hub does.
struct FakeHub {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl FakeHub {
    fn serve(files: BTreeMap<String, Vec<u8>>, wrong_digest: bool) -> FakeHub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        // Ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, seen) = (files.clone(), Arc::clone(&seen));
                thread::spawn(move || answer(stream, &files, wrong_digest, &seen));
            }
        });
        FakeHub { address, requests }
    }

    fn fetch(&self, workplace: &Workplace, arguments: &[&str]) -> Ended {
        let mut command = workplace.calor();
        command
            .env("HF_ENDPOINT", &self.address)
            .arg("fetch")
            .args(arguments);
        workplace.ended(command.output().expect("the binary starts"))
    }
}

fn answer(
    stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    wrong_digest: bool,
    seen: &Mutex<Vec<String>>,
) {
    let mut reader = BufReader::new(stream.try_clone().expect("a stream"));
    let mut stream = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let path = line
            .split_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned();
        let (mut range, mut authorised) = (None, String::new());
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).expect("a header");
            let header = header.trim();
            if header.is_empty() {
                break;
            }
            let (name, value) = header.split_once(": ").unwrap_or((header, ""));
            match name.to_ascii_lowercase().as_str() {
                "range" => range = value.strip_prefix("bytes=").map(str::to_owned),
                "authorization" => authorised = format!(" [{value}]"),
                _ => {}
            }
        }
        seen.lock()
            .expect("the list")
            .push(format!("{path}{authorised}"));
        let resolve = format!("/owner/small/resolve/{COMMIT}/");
        let reply = if path == "/api/models/owner/small/revision/main" {
            let siblings: Vec<_> = files
                .keys()
                .map(|name| serde_json::json!({"rfilename": name}))
                .collect();
            let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
            format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
                .into_bytes()
        } else if let Some(content) = path.strip_prefix(&resolve).and_then(|name| files.get(name)) {
            let mut digest = Sha256::digest(content);
            if wrong_digest {
                digest[0] ^= 1;
            }
            let tag: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            let range = range.unwrap_or_else(|| "0-".to_owned());
            let (from, to) = range.split_once('-').expect("a range");
            let from: usize = from.parse().expect("a start");
            let to = to
                .parse()
                .map_or(content.len(), |last: usize| (last + 1).min(content.len()));
            let part = &content[from..to];
            let mut reply = format!(
                "HTTP/1.1 206 Partial Content\r\nETag: \"{tag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{}/{}\r\nContent-Length: {}\r\n\r\n",
                to.saturating_sub(1),
                content.len(),
                part.len()
            )
            .into_bytes();
            reply.extend_from_slice(part);
            reply
        } else {
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec()
        };
        if stream.write_all(&reply).is_err() {
            return;
        }
    }
}

fn files_of(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).expect("a folder").flatten();
    entries
        .map(|entry| {
            (
                entry.file_name().into_string().expect("a name"),
                fs::read(entry.path()).expect("a file"),
            )
        })
        .collect()
}

fn checkpoint() -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().expect("a folder");
    write_checkpoint(folder.path());
    files_of(folder.path())
}

#[test]
fn without_a_network_it_says_so_and_what_to_do() {
    let ended = Workplace::empty()
        .run(["fetch", "sentence-transformers/all-MiniLM-L6-v2"])
        .with_status(1);
    assert_eq!(ended.stdout, "");
    assert_snapshot!(ended.shown());
}

#[test]
fn offline_it_does_not_ask() {
    let workplace = Workplace::empty();
    let hub = FakeHub::serve(checkpoint(), false);
    let mut command = workplace.calor();
    command
        .env("HF_ENDPOINT", &hub.address)
        .env("HF_HUB_OFFLINE", "1")
        .args(["fetch", "owner/small"]);
    let ended = workplace
        .ended(command.output().expect("the binary starts"))
        .with_status(1);
    assert!(hub.requests.lock().expect("the list").is_empty());
    assert_snapshot!(ended.shown());
}

#[test]
fn a_checkpoint_comes_whole_and_is_found_again_without_the_hub() {
    let workplace = Workplace::empty();
    let files = checkpoint();
    let hub = FakeHub::serve(files.clone(), false);
    let ended = hub.fetch(&workplace, &["owner/small", "--json"]).done();
    let snapshot = ended.json();
    assert_eq!(snapshot["commit"], COMMIT);
    let folder = workplace
        .path("hub/hub/models--owner--small/snapshots")
        .join(COMMIT);
    assert_eq!(files_of(&folder), files);
    for line in [
        "Fetching config.json",
        "Fetching model.safetensors",
        "Fetching tokenizer.json",
    ] {
        assert!(ended.stderr.contains(line), "{}", ended.stderr);
    }

    // The hub is gone: the port is closed.
    let again = workplace.run(["fetch", "owner/small"]).done();
    assert_eq!(
        again.stdout.trim(),
        format!("[folder]/hub/hub/models--owner--small/snapshots/{COMMIT}")
    );
    assert!(
        again
            .stderr
            .contains("does not answer; the copy in the cache is used"),
        "{}",
        again.stderr
    );
}

#[test]
fn what_is_there_is_not_fetched_twice_and_the_token_goes_along() {
    let workplace = Workplace::empty();
    let hub = FakeHub::serve(checkpoint(), false);
    let mut command = workplace.calor();
    command
        .env("HF_ENDPOINT", &hub.address)
        .env("HF_TOKEN", "hf_secret")
        .args(["fetch", "owner/small"]);
    workplace
        .ended(command.output().expect("the binary starts"))
        .done();
    let requests: Vec<String> = std::mem::take(&mut *hub.requests.lock().expect("the list"));
    assert!(
        requests.len() > 3
            && requests
                .iter()
                .all(|request| request.ends_with("[Bearer hf_secret]")),
        "{requests:?}"
    );
    hub.fetch(&workplace, &["owner/small"]).done();
    assert_eq!(
        *hub.requests.lock().expect("the list"),
        ["/api/models/owner/small/revision/main"]
    );
}

#[test]
fn a_damaged_download_is_refused() {
    let workplace = Workplace::empty();
    let hub = FakeHub::serve(checkpoint(), true);
    let ended = hub.fetch(&workplace, &["owner/small"]).with_status(1);
    assert!(
        ended.stderr.contains("is damaged: its SHA-256 is"),
        "{}",
        ended.stderr
    );
    assert!(
        ended.stderr.contains("hint: remove [folder]"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_repository_that_is_no_checkpoint_is_refused_before_anything_is_fetched() {
    let workplace = Workplace::empty();
    let mut files = checkpoint();
    files.remove("model.safetensors");
    files.insert("pytorch_model.bin".into(), vec![0]);
    let hub = FakeHub::serve(files, false);
    let ended = hub.fetch(&workplace, &["owner/small"]).with_status(1);
    assert_snapshot!(ended.shown());
    assert_eq!(hub.requests.lock().expect("the list").len(), 1);
}

#[test]
fn an_unknown_repository_is_named() {
    let workplace = Workplace::empty();
    let hub = FakeHub::serve(checkpoint(), false);
    let ended = hub
        .fetch(&workplace, &["owner/other", "--revision", "v2"])
        .with_status(1);
    assert!(
        ended
            .stderr
            .contains("did not give owner/other (revision v2): http status: 404"),
        "{}",
        ended.stderr
    );
}
