//! `tacet chat` over real parties: turns, reuse, interruption, commands. The model comes from `TACET_SHARED`; without it the
//! tests say that they were skipped.

#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;
#[path = "common/stories.rs"]
mod stories;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use local::Lane;
use serde_json::Value;
use stories::{Folder, stories};
use tacet_party::config::Limits;

/// A first message continues the tale as the model was trained to.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n' }}\
    {% elif m.role == 'user' and not loop.first %}{{ '\n' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}";
/// What stories260K makes of "Once upon a time" (its greedy_200.txt).
const TALE: &str = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a \
    big, red ball.";

fn tacet() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tacet"))
}

/// One lane at a time: three parties, a client and their deadlines share the machine's cores.
static ALONE: Mutex<()> = Mutex::new(());

/// A copy of the model that can chat.
fn model(test: &str) -> Option<(Folder, MutexGuard<'static, ()>)> {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let copy = stories(&format!("chat-{test}"))?;
    std::fs::write(copy.0.join("chat_template.jinja"), TEMPLATE).unwrap();
    Some((copy, alone))
}

fn chat(model: &Folder, more: &[&str]) -> Child {
    chat_with(model, &[&["--local"], more].concat())
}

fn chat_with(model: &Folder, more: &[&str]) -> Child {
    tacet()
        .args(["chat", "--temperature", "0", "--model", model.0.to_str().unwrap()])
        .args(more)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap()
}

/// A chat that refuses its arguments ends before it reads, perhaps before this writes.
fn said(child: Child, input: &str) -> Output {
    let mut child = child;
    match child.stdin.take().unwrap().write_all(input.as_bytes()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
        written => written.unwrap(),
    }
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn turns_go_on_where_the_last_one_ended() {
    let Some((model, _alone)) = model("turns") else { return };
    let lines = "Once upon a time\n\nThe \\\npark\n/retry\n/reset\nOnce upon a time\n";
    let out = said(chat(&model, &["--max-tokens", "30", "--json"]), lines);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let answers: Vec<Value> = text(&out.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let number = |i: usize, key: &str| answers[i][key].as_u64().unwrap();
    assert_eq!(answers.len(), 4);
    assert!(answers.iter().all(|a| a["finish"] == "length" && a["tokens"] == 30));
    assert!(TALE.starts_with(answers[0]["text"].as_str().unwrap()), "{}", answers[0]);
    // The last token of an answer is not evaluated before it is needed.
    assert_eq!((number(0, "reused_tokens"), number(1, "reused_tokens")), (0, number(0, "prompt_tokens") + 29));
    // Again from the last token of the prompt on.
    assert_eq!(number(2, "reused_tokens"), number(2, "prompt_tokens") - 1);
    assert_eq!((&answers[2]["text"], &answers[3]["text"]), (&answers[1]["text"], &answers[0]["text"]));
    assert_eq!(number(3, "reused_tokens"), 0);
}

#[test]
fn an_interrupt_stops_the_answer_and_a_second_one_the_chat() {
    let Some((model, _alone)) = model("interrupt") else { return };
    let mut child = chat(&model, &["--system", "A tale."]);
    let mut input = child.stdin.take().unwrap();
    let (shown, errors) = (Shown::of(child.stdout.take().unwrap()), Shown::of(child.stderr.take().unwrap()));
    // To the group, as a terminal does it: the parties must not take it for theirs.
    let group = format!("-{}", child.id());
    let interrupt = || assert!(Command::new("kill").args(["-INT", "--", &group]).status().unwrap().success());
    let mut heard = 0;
    let mut told = |what: &str| {
        let found = |new: &[u8]| new.windows(what.len()).position(|w| w == what.as_bytes());
        // To the end of its line, which may come in parts.
        heard = errors.until(|s| found(&s[heard..]).is_some_and(|at| s[heard + at..].contains(&b'\n')));
    };
    let mut before = 0;
    for message in ["Once upon a time", "Then"] {
        writeln!(input, "{message}").unwrap();
        shown.until(|s| s.len() > before);
        interrupt();
        told("stopped: Ctrl-C again");
        // What ends the answer was written before that was said.
        before = shown.until(|s| s.len() > before && s.ends_with(b"\n"));
    }
    let file = model.0.join("saved.json");
    for command in [&format!("/save {}", file.display()), "/system", "/stats"] {
        writeln!(input, "{command}").unwrap();
    }
    told("were kept from before");
    interrupt();
    told("Ctrl-C again");
    interrupt();
    assert!(child.wait().unwrap().success());

    let saved: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let messages = saved["messages"].as_array().unwrap();
    let roles: Vec<&str> = messages.iter().map(|m| m["role"].as_str().unwrap()).collect();
    let content = |i: usize| messages[i]["content"].as_str().unwrap();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!((content(0), content(1), content(3)), ("A tale.", "Once upon a time", "Then"));
    assert_eq!(text(&shown.0.lock().unwrap()), format!("{}\n{}\n", content(2), content(4)));
}

#[test]
fn a_sequence_that_the_parties_gave_up_begins_again() {
    let Some((model, _alone)) = model("idle") else { return };
    let limits = Limits { idle_s: 5, ..Limits::default() };
    let lane = Lane::start(Path::new(env!("CARGO_BIN_EXE_tacet")), &model.0, limits).unwrap();
    let parties = model.0.join("parties.toml");
    std::fs::write(&parties, toml::to_string(&lane.parties).unwrap()).unwrap();
    let mut child = chat_with(&model, &["--json", "--max-tokens", "8", "--parties", parties.to_str().unwrap()]);
    let (mut input, shown) = (child.stdin.take().unwrap(), Shown::of(child.stdout.take().unwrap()));
    writeln!(input, "Once upon a time").unwrap();
    let first = shown.until(|s| s.ends_with(b"\n"));
    let end = Instant::now() + Duration::from_secs(60);
    while (0..3).any(|p| lane.metric(p, "tacet_sessions") != Some(0)) {
        assert!(Instant::now() < end, "the parties keep an idle sequence");
        std::thread::sleep(Duration::from_millis(50));
    }
    writeln!(input, "Then").unwrap();
    shown.until(|s| s.len() > first && s.ends_with(b"\n"));
    drop(input);
    assert!(child.wait().unwrap().success());
    let second: Value = serde_json::from_slice(&shown.0.lock().unwrap()[first..]).unwrap();
    assert_eq!((&second["tokens"], &second["reused_tokens"]), (&8.into(), &0.into()));
    assert!(second["prompt_tokens"].as_u64().unwrap() > 12);
}

/// What a process wrote so far.
struct Shown(Arc<Mutex<Vec<u8>>>);

impl Shown {
    fn of(mut from: impl Read + Send + 'static) -> Shown {
        let all = Arc::<Mutex<Vec<u8>>>::default();
        let to = Arc::clone(&all);
        std::thread::spawn(move || {
            let mut part = [0; 256];
            while let Ok(n @ 1..) = from.read(&mut part) {
                to.lock().unwrap().extend(&part[..n]);
            }
        });
        Shown(all)
    }

    /// Waits until it is so; returns the length.
    fn until(&self, so: impl Fn(&[u8]) -> bool) -> usize {
        let end = Instant::now() + Duration::from_secs(60);
        while !so(&self.0.lock().unwrap()) {
            assert!(Instant::now() < end, "waited too long: {:?}", text(&self.0.lock().unwrap()));
            std::thread::sleep(Duration::from_millis(5));
        }
        self.0.lock().unwrap().len()
    }
}

#[test]
fn errors_end_a_piped_chat_and_say_what_to_do() {
    let Some((model, _alone)) = model("errors") else { return };
    let out = said(chat(&model, &["--max-tokens", "4"]), "Once\n/nothing\nTwice\n");
    assert_eq!((out.status.code(), text(&out.stdout).lines().count()), (Some(1), 1));
    assert!(text(&out.stderr).contains("/help lists them"), "{}", text(&out.stderr));

    let long = "a tale ".repeat(400);
    let out = said(chat(&model, &[]), &format!("{long}\n"));
    let error = text(&out.stderr);
    assert!(out.status.code() == Some(1) && error.contains("/reset") && error.contains("512"), "{error}");

    std::fs::write(model.0.join("chat_template.jinja"), "{% for").unwrap();
    let out = said(chat(&model, &[]), "Once\n");
    assert!(text(&out.stderr).contains("chat template: "), "{}", text(&out.stderr));
    std::fs::remove_file(model.0.join("chat_template.jinja")).unwrap();
    let out = said(chat(&model, &[]), "");
    let error = text(&out.stderr);
    assert!(out.status.code() == Some(1) && out.stdout.is_empty());
    assert!(error.contains("tacet generate") && error.contains("--chat-template FILE"), "{error}");
    let own = model.0.join("own.jinja");
    std::fs::write(&own, TEMPLATE).unwrap();
    let out = said(chat(&model, &["--max-tokens", "8", "--chat-template", own.to_str().unwrap()]), "Once upon a time");
    assert!(out.status.success() && TALE.starts_with(text(&out.stdout).trim_end()), "{}", text(&out.stdout));
}
