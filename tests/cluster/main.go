// Command apiserver is a Kubernetes control plane for tests, as one program: the real
// kube-apiserver, etcd and kubectl, chosen by the first argument as busybox does; and what kubelet
// makes of Services for containers.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
	corev1 "k8s.io/api/core/v1"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubectl's credentials
	"k8s.io/component-base/cli"
	"k8s.io/kubectl/pkg/cmd"
	kubectl "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/pkg/kubelet/envvars"
)

func main() {
	if len(os.Args) < 2 {
		usage()
	}
	os.Args = os.Args[1:]
	switch os.Args[0] {
	case "etcd":
		etcdmain.Main(os.Args)
	case "kube-apiserver":
		os.Exit(cli.Run(app.NewAPIServerCommand()))
	case "kubectl":
		if err := cli.RunNoErrOutput(cmd.NewDefaultKubectlCommand()); err != nil {
			kubectl.CheckErr(err)
		}
	case "envvars":
		if err := printEnvironment(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	default:
		usage()
	}
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: apiserver {etcd | kube-apiserver | kubectl | envvars} [argument...]")
	os.Exit(2)
}

// printEnvironment reads lists of Services, a JSON array each, and prints an array of variables
// for each of them.
func printEnvironment() error {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for in.More() {
		var services []*corev1.Service
		if err := in.Decode(&services); err != nil {
			return err
		}
		if err := out.Encode(envvars.FromServices(services)); err != nil {
			return err
		}
	}
	return nil
}
