//! What goes wrong at the local endpoint while real parties work for it: clients that leave, parties that die, floods, and
//! requests that must end before anyone hears of them. The model comes from `TACET_SHARED`.

#[path = "common/processes.rs"]
#[allow(dead_code)]
mod processes;

use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::sync::Barrier;

use processes::{Home, Lane, Reply, Served, decoder, until};
use serde_json::{Value, json};
use tacet_party::config::Limits;

const MODEL: &str = "story";
/// A path of either dialect that streams.
const STREAMS: [&str; 2] = ["/v1/completions", "/api/generate"];
/// More than the context takes: an answer that goes on until something ends it.
const ENDLESS: usize = 500;

fn start(home: &Home, more: &[&str]) -> Option<(Lane, Served)> {
    let model = decoder()?;
    let lane = Lane::start(home, "lane", &model, Limits::default());
    let parties = ["--parties", lane.parties.to_str().unwrap()];
    let served = Served::start(home, MODEL, &model, &[&parties, more].concat());
    Some((lane, served))
}

/// A stream of either dialect that has begun to answer.
fn endless(s: &Served, model: &str, path: &str) -> BufReader<TcpStream> {
    let options = json!({"num_predict": ENDLESS, "temperature": 1.2, "top_k": 0, "top_p": 1});
    let body = match path {
        "/api/generate" => json!({"model": model, "prompt": "Once", "raw": true, "options": options}),
        _ => json!({"model": model, "prompt": "Once", "max_tokens": ENDLESS, "stream": true, "ignore_eos": true}),
    };
    let mut stream = BufReader::new(s.open(path, body.to_string().as_bytes()));
    let (mut line, mut head) = (String::new(), true);
    while head || !line.contains('{') {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the stream ended early");
        head &= line != "\r\n";
    }
    assert!(line.contains(r#""text":"#) || line.contains(r#""response":"#), "{line}");
    stream
}

fn two_tokens(model: &str) -> Vec<u8> {
    json!({"model": model, "prompt": "Once", "max_tokens": 2}).to_string().into_bytes()
}

fn short(s: &Served) -> Reply {
    s.post("/v1/completions", two_tokens(MODEL))
}

fn sessions(lane: &Lane) -> [u64; 3] {
    [0, 1, 2].map(|i| lane.metric(i, "tacet_sessions"))
}

#[test]
fn a_client_that_leaves_frees_all_parties() {
    let home = Home::new();
    let Some((lane, s)) = start(&home, &["--running", "1"]) else { return };
    for path in STREAMS {
        let stream = endless(&s, MODEL, path);
        assert_eq!(sessions(&lane), [1; 3], "{path}");
        assert_eq!(short(&s).status, 429);
        drop(stream);
        until("the parties to hear of it", || sessions(&lane) == [0; 3]);
        until("the endpoint to have room", || short(&s).status == 200);
        // What it answered is kept for a next turn, until another prompt of this model takes its place.
        let unload = json!({"model": MODEL, "keep_alive": 0}).to_string();
        assert_eq!(s.post("/api/generate", unload).status, 200);
        until("the kept conversation to end", || sessions(&lane) == [0; 3]);
    }
}

#[test]
fn a_killed_party_ends_streams_with_an_error_in_their_own_form() {
    let home = Home::new();
    let Some(model) = decoder() else { return };
    // Side by side: a party that died is missed only after ten silent seconds.
    let mut all: Vec<(Lane, Served)> = (0..3)
        .map(|victim| {
            let lane = Lane::start(&home, &format!("lane{victim}"), &model, Limits::default());
            let parties = lane.parties.to_str().unwrap();
            let served = Served::start(&home, &format!("story{victim}"), &model, &["--parties", parties]);
            (lane, served)
        })
        .collect();
    let streams: Vec<_> =
        all.iter().enumerate().map(|(v, (_, s))| STREAMS.map(|p| endless(s, &format!("story{v}"), p))).collect();
    all.iter_mut().enumerate().for_each(|(victim, (lane, _))| lane.kill(victim));
    for (victim, streams) in streams.into_iter().enumerate() {
        for (mut stream, path) in streams.into_iter().zip(STREAMS) {
            let mut rest = String::new();
            stream.read_to_string(&mut rest).expect("the stream ends");
            let last = rest.trim_end().lines().last().unwrap_or_default();
            let whole = last == "data: [DONE]" || last.contains(r#""done":true"#);
            println!(
                "party {victim} was killed: {path} went on for {} lines, to its end: {whole}",
                rest.lines().count()
            );
            // What a dealer has dealt ahead may serve a whole answer, which then ends as answers do.
            if victim == 2 && whole {
                continue;
            }
            let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap_or(last)).expect(last);
            let message = if path == STREAMS[0] { &error["error"]["message"] } else { &error["error"] };
            // Whoever heard of it first, the one that died is named.
            assert!(message.as_str().is_some_and(|m| m.contains(processes::LANE[victim].0)), "{victim}: {last}");
            assert!(path != STREAMS[0] || error["error"]["type"] == "server_error", "{victim}: {last}");
        }
    }
    // The endpoints go on; each says who is missing.
    let asked = all.iter().enumerate().map(|(v, (_, s))| s.open("/v1/completions", &two_tokens(&format!("story{v}"))));
    for (victim, stream) in asked.collect::<Vec<_>>().into_iter().enumerate() {
        let next = Reply::read(stream);
        assert!([502, 503].contains(&next.status), "{next:?}");
        let name = processes::LANE[victim].0;
        assert!(next.json()["error"]["message"].as_str().unwrap().contains(name), "{victim}: {next:?}");
    }
}

#[test]
fn a_flood_is_answered_to_the_last_request() {
    const ALL: usize = 200;
    let home = Home::new();
    let Some((lane, s)) = start(&home, &["--running", "8"]) else { return };
    let together = Barrier::new(ALL);
    let replies: Vec<Reply> = std::thread::scope(|scope| {
        let one = |i: usize| {
            let (s, together) = (&s, &together);
            scope.spawn(move || {
                together.wait();
                if i.is_multiple_of(2) {
                    return short(s);
                }
                let body = json!({"model": MODEL, "prompt": "Once", "stream": false, "options": {"num_predict": 2}});
                s.post("/api/generate", body.to_string())
            })
        };
        let all: Vec<_> = (0..ALL).map(one).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let of = |status: u16| replies.iter().filter(move |r| r.status == status);
    let (done, later) = (of(200).count(), of(429).count());
    println!("{ALL} requests: {done} answered, {later} told to come back");
    assert_eq!(done + later, ALL, "{:?}", replies.iter().find(|r| ![200, 429].contains(&r.status)));
    assert!(done >= 8 && later > 0, "{done} {later}");
    assert!(of(429).all(|r| r.head.contains("\r\nretry-after: 1")));
    let openai = of(429).filter(|r| r.json()["error"]["code"] == "rate_limit_exceeded").count();
    assert_eq!(openai + of(429).filter(|r| r.json()["error"].is_string()).count(), later);
    assert_eq!(short(&s).status, 200);
    // Conversations that wait for a next turn are all that is left.
    until("the sessions to end", || sessions(&lane).iter().all(|n| *n <= 4));
    assert_eq!([0, 1, 2].map(|i| lane.metric(i, "tacet_sessions_failed_total")), [0; 3]);
}

#[test]
fn what_cannot_be_served_is_refused_before_the_parties_hear_of_it() {
    let home = Home::new();
    let Some((lane, s)) = start(&home, &[]) else { return };
    let long = "tale ".repeat(600);
    let huge = format!(r#"{{"model": "{MODEL}", "prompt": "{}"}}"#, "x".repeat(5 << 20));
    let cases = [
        ("context", 400, json!({"model": MODEL, "prompt": long}).to_string(), "context is 512"),
        ("json", 400, r#"{"model": "story", "prompt""#.into(), "not valid JSON"),
        ("type", 400, json!({"model": MODEL, "prompt": {"a": 1}}).to_string(), "prompt: must be"),
        ("model", 404, json!({"model": "gpt-4o", "prompt": "x"}).to_string(), "\"gpt-4o\" not found"),
        ("huge", 413, huge, "longer than"),
    ];
    for (what, status, body, says) in cases {
        let r = s.post("/v1/completions", &body);
        let v = r.json();
        assert_eq!((r.status, v["error"]["type"].as_str()), (status, Some("invalid_request_error")), "{what}: {r:?}");
        assert!(v["error"]["message"].as_str().unwrap().contains(says), "{what}: {r:?}");
        let r = s.post("/api/generate", &body);
        assert_eq!(r.status, status, "{what}: {r:?}");
        assert!(r.json()["error"].as_str().unwrap().contains(says), "{what}: {r:?}");
    }
    // This model has no chat template.
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Once"}]}).to_string();
    for path in ["/v1/chat/completions", "/api/chat"] {
        let r = s.post(path, &body);
        assert!(r.status == 400 && r.body.contains("cannot chat: complete texts"), "{path}: {r:?}");
    }
    let code = s.post("/v1/completions", json!({"model": MODEL, "prompt": long}).to_string()).json();
    assert_eq!(code["error"]["code"], "context_length_exceeded");
    assert_eq!([0, 1, 2].map(|i| lane.metric(i, "tacet_sessions_accepted_total")), [0; 3]);
    assert_eq!(short(&s).status, 200);
    assert_eq!([0, 1, 2].map(|i| lane.metric(i, "tacet_sessions_accepted_total")), [1; 3]);
}
